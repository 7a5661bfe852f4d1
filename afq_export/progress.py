"""Progress as a plain callback, so that no stage knows about terminals."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a label, steps done, and steps in all (done == total: finished)."""


def silent(label: str, done: int, total: int) -> None:
    """Reports nothing."""
