"""Programs of this machine that setting a device up needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from afq_export.errors import MissingToolError

SHOWN = 240
"""Characters of a program's complaint that an error repeats."""


def require(program: str, purpose: str) -> None:
    """Raises MissingToolError when `program` is not on the path."""
    if shutil.which(program) is None:
        raise MissingToolError(f"{program} is not on this machine", why=f"it {purpose}")


def run(
    command: Sequence[str | Path],
    what: str,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    good: Sequence[int] = (0,),
) -> str:
    """Standard output of a command that must end well, with one of the exit codes `good`.

    Raises MissingToolError that says `what` could not be done, and the line that the program ended with.
    """
    try:
        done = subprocess.run(
            list(map(str, command)),
            env={**os.environ, **(environment or {})},
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise MissingToolError(what, where=str(command[0]), why=error.strerror or str(error)) from error
    if done.returncode not in good:
        raise MissingToolError(what, where=Path(command[0]).name, why=complaint(done.stderr, done.returncode))
    return done.stdout


def complaint(stderr: str, code: int) -> str:
    """The line of standard error that says most: the last that names an error, else the last."""
    named = [line for line in stderr.splitlines() if "error" in line.lower() or line.startswith("E:")]
    return last_line("\n".join(named) or stderr, code)


def last_line(stderr: str, code: int) -> str:
    """What a program said last; the exit code when it said nothing."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return (lines or [f"exit code {code}"])[-1][:SHOWN]
