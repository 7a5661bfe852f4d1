"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from afq_export.errors import InputError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that has no locks: nothing is held there, and nothing refused."""


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Holds the lock file `path`, which says who does, while the body runs. The folder must be there.

    The kernel gives the lock up with the process that has it, however that ends: no stale lock is ever in the way, and
    no clock or process number is trusted. Raises InputError naming the holder when another one has it.
    """
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError("cannot write", where=str(path.parent), why=why, do="name another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                "another run is in this folder",
                where=str(path.parent),
                why=_holder(file),
                do="wait for it, or work in another folder",
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        _say(file, _this_process())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk must not hide what the body says
                _say(file, {})


def _this_process() -> dict[str, str]:
    """What helps a reader to find it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"process": str(os.getpid()), "host": platform.node(), "since": since, "command": shlex.join(sys.argv)}


def _say(file: IO[str], facts: dict[str, str]) -> None:
    """Puts `facts` in the place of what the file says. On a full disk it says nothing; the lock holds all the same."""
    file.seek(0)
    file.truncate()
    with contextlib.suppress(OSError):
        file.write(json.dumps(facts) if facts else "")
        file.flush()


def _holder(file: IO[str]) -> str:
    """Who has it, as far as the file says."""
    file.seek(0)
    try:
        facts = json.loads(file.read())
        return f"process {facts['process']} on {facts['host']} since {facts['since']}: {facts['command']}"
    except (ValueError, KeyError, TypeError):
        return "it does not say which"
