"""The command line, killed by itself at the moment before a named file or folder would be whole.

    python -m tests.end_to_end.stopped NAME ARGUMENT...

Everything is written beside its place and renamed (files.py), so this is where a kill leaves most behind.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from afq_export.cli import call


def kill_before(name: str) -> None:
    """SIGKILL to this process when something is about to be renamed to `name`; it cannot be caught."""
    rename = os.replace

    def replace(source: str | Path, target: str | Path) -> None:
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace


if __name__ == "__main__":
    kill_before(sys.argv[1])
    sys.exit(call(sys.argv[2:]))
