"""Files written whole or not at all, and digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from afq_export.errors import InputError


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_data(value: Any) -> str:
    """Hex sha256 of plain data in canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when the body ends well and removed when it does not.

    Raises InputError, and leaves what was at `path`, when the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise write_failed(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder next to `path`, put in its place when the body ends well (an older one is replaced)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise write_failed(path, error) from error
    try:
        temporary.chmod(0o755)
        yield temporary
        if path.exists():
            old = temporary.with_suffix(".old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise write_failed(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with write_beside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes canonical, readable JSON (sorted keys, final newline), whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_failed(path: Path, error: OSError) -> InputError:
    """The one line for a failed write."""
    return InputError(
        "cannot write", where=str(path), why=error.strerror or str(error), do="free space or name another folder"
    )
