"""Programs of this machine that reach a device: run to their end, or stopped with all that they started."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from afq_export.errors import MissingToolError


@dataclasses.dataclass(frozen=True)
class Output:
    """Exit code (negative: the signal) and what was said; `stdout` is empty when it went to a file."""

    code: int
    stdout: bytes
    stderr: str


def execute(command: Sequence[str], *, timeout: float, stdin: Path | None = None, stdout: Path | None = None) -> Output:
    """Runs `command` with its output in files: a daemon that it leaves behind (ssh's, adb's) keeps no pipe open.

    It has a session of its own, so that Ctrl-C reaches this process only, which then stops it. Raises MissingToolError
    when it cannot be started, and subprocess.TimeoutExpired after `timeout` seconds.
    """
    with contextlib.ExitStack() as stack:
        source: IO[bytes] | int = stack.enter_context(stdin.open("rb")) if stdin else subprocess.DEVNULL
        said = stack.enter_context(stdout.open("wb")) if stdout else stack.enter_context(tempfile.TemporaryFile())
        complaints = stack.enter_context(tempfile.TemporaryFile())
        try:
            process = subprocess.Popen(command, stdin=source, stdout=said, stderr=complaints, start_new_session=True)
        except OSError as error:
            raise MissingToolError("cannot start", where=command[0], why=error.strerror or str(error)) from error
        try:
            code = process.wait(timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        complaints.seek(0)
        if not stdout:
            said.seek(0)
        return Output(code, b"" if stdout else said.read(), complaints.read().decode(errors="replace"))
