"""The command line under a wall clock that jumps by hours and decades, both ways, every time that it is asked.

python -m tests.end_to_end.jumping ARGUMENT...
"""

from __future__ import annotations

import itertools
import sys
import time

from afq_export.cli import call

JUMPS = (0, -900_000_000, 900_000_000, -3600, 7200, -1)
"""Seconds, one after another."""


def let_jump() -> None:
    """Replaces Python's wall clock; the monotonic clock stays as it is."""
    real, jumps = time.time_ns, itertools.cycle(JUMPS)
    time.time_ns = lambda: real() + next(jumps) * 10**9
    time.time = lambda: time.time_ns() / 1e9


if __name__ == "__main__":
    let_jump()
    sys.exit(call(sys.argv[1:]))
