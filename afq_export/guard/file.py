"""The baseline file: a line that names it, the size of what is in it, then xz over msgpack.

The same baseline gives the same bytes. Nothing is unpacked beyond the size that the file states, nor that beyond
MAX_BYTES; xz carries a checksum of the content.
"""

from __future__ import annotations

import lzma
import struct
from pathlib import Path

import msgspec

from afq_export.errors import InputError
from afq_export.files import write_beside
from afq_export.spec.baseline import SCHEMA_VERSION, Baseline

MAGIC = b"afq-export baseline\n"
SIZE = struct.Struct("<Q")
MAX_BYTES = 1 << 29
"""Unpacked: 512 MiB are some ten million tokens."""
MAX_MEMORY = 1 << 28
"""What unpacking may take besides."""
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6}]


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Writes the file, whole or not at all. Raises InputError."""
    content = msgspec.msgpack.encode(baseline, order="deterministic")
    packed = lzma.compress(content, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=FILTERS)
    with write_beside(path) as part:
        part.write_bytes(MAGIC + SIZE.pack(len(content)) + packed)


def read_baseline(path: Path) -> Baseline:
    """The baseline at `path`. Raises InputError: missing, something else, damaged, too large, of another version."""
    where = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
    except OSError as error:
        raise InputError("cannot read the baseline", where=where, why=error.strerror or str(error)) from error
    if not data.startswith(MAGIC):
        raise InputError("not a baseline", where=where, do="`afq-export baseline create` makes one")
    content = _unpacked(data[len(MAGIC) :], where)
    _refuse_other_version(content, where)
    try:
        return msgspec.msgpack.decode(content, type=Baseline)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("the baseline does not fit", where=where, why=str(error)) from error


def _unpacked(data: bytes, where: str) -> bytes:
    if len(data) < SIZE.size:
        raise InputError("the baseline is damaged", where=where, why="it is truncated")
    (size,) = SIZE.unpack(data[: SIZE.size])
    if size > MAX_BYTES:
        raise InputError("the baseline is too large", where=where, why=f"{size} bytes, at most {MAX_BYTES} are read")
    unpacker = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MAX_MEMORY)
    try:
        content = unpacker.decompress(data[SIZE.size :], max_length=size + 1)
    except lzma.LZMAError as error:
        raise InputError("the baseline is damaged", where=where, why=str(error)) from error
    if len(content) > size:
        raise InputError("the baseline is damaged", where=where, why=f"it holds more than the {size} bytes it states")
    if not unpacker.eof or len(content) < size:
        raise InputError("the baseline is damaged", where=where, why="it is truncated")
    if unpacker.unused_data:
        raise InputError("the baseline is damaged", where=where, why="something follows it")
    return content


def _refuse_other_version(content: bytes, where: str) -> None:
    class Head(msgspec.Struct):
        schema_version: int

    try:
        version = msgspec.msgpack.decode(content, type=Head).schema_version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("the baseline does not fit", where=where, why=str(error)) from error
    if version != SCHEMA_VERSION:
        raise InputError(
            "a baseline of another version of this program", where=where, why=f"format {version}, not {SCHEMA_VERSION}"
        )
