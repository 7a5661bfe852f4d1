"""Files written whole or not at all, and digests."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from afq_export.errors import InputError

PART = ".part"
"""Ends the name of what is not whole yet; a dot begins it."""

FULL = os.strerror(errno.ENOSPC)
"""What safetensors and tokenizers say in exceptions of their own, which are no OSError, when the disk is full."""


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when the body ends well and removed when it does not.

    Raises InputError, and leaves what was at `path`, when the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with _write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def refuse_unwritable(path: Path) -> None:
    """Raises InputError when no file could be written at `path`: said before long work, not after it.

    Nothing is left behind; a disk that is full later is still for the writer to tell.
    """
    with _write_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder next to `path`, put in its place when the body ends well (an older one is replaced).

    Raises InputError, and leaves what was at `path`, when the disk is full or the folder cannot be written.
    """
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
    try:
        with _write_errors(path):
            temporary.chmod(0o755)
            yield temporary
            _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what a killed process left half-written in `folder`."""
    for leftover in sorted(folder.glob(f".*{PART}")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with write_beside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes canonical, readable JSON (sorted keys, final newline), whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def _put_in_place(temporary: Path, path: Path) -> None:
    """Renames the folder `temporary` to `path`, whatever stood there."""
    if path.exists():
        old = temporary.with_name(f".{path.name}.old{PART}")
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Failed writes as the one line that they are: InputError."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise _write_failed(path, error.strerror or str(error)) from error
    except Exception as error:
        if FULL not in str(error):
            raise
        raise _write_failed(path, FULL) from error


def _write_failed(path: Path, why: str) -> InputError:
    return InputError("cannot write", where=str(path), why=why, do="free space or name another folder")
