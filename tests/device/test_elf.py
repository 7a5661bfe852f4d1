"""A shared library made of the few fields that count, changed and read again."""

from __future__ import annotations

import struct

import pytest

from afq_export.device.elf import MAGIC, without_initializers
from afq_export.errors import MissingToolError

ADDRESS = 0x10000
"""Where the file is loaded: its names' address in memory is not their place in the file."""
NAMES = b"\0libkept.so\0libtorch.so\0libc10.so\0"
TABLE, STRINGS, DYNAMIC = 64, 64 + 2 * 56, 64 + 2 * 56 + len(NAMES)


def name_at(name: bytes) -> int:
    return NAMES.index(name)


ENTRIES = [
    (1, name_at(b"libkept.so")),
    (1, name_at(b"libtorch.so")),
    (12, 0x400),
    (25, 0x500),
    (27, 88),
    (26, 0x600),
    (28, 8),
    (5, ADDRESS + STRINGS),
    (1, name_at(b"libc10.so")),
    (6, 0x700),
    (0, 0),
]


def library(entries: list[tuple[int, int]] = ENTRIES) -> bytes:
    header = bytearray(64)
    header[: len(MAGIC)] = MAGIC
    struct.pack_into("<Q", header, 32, TABLE)
    struct.pack_into("<HH", header, 54, 56, 2)
    size = DYNAMIC + 16 * len(entries)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, ADDRESS, ADDRESS, size, size, 0x1000)
    dynamic = struct.pack("<IIQQQQQQ", 2, 6, DYNAMIC, ADDRESS + DYNAMIC, 0, 16 * len(entries), 0, 8)
    return bytes(header) + load + dynamic + NAMES + b"".join(struct.pack("<QQ", *entry) for entry in entries)


def entries_of(data: bytes) -> list[tuple[int, int]]:
    return [struct.unpack_from("<QQ", data, at) for at in range(DYNAMIC, len(data), 16)]


def test_what_is_left_out_goes_and_the_rest_stays() -> None:
    changed = without_initializers(library(), lambda name: name.startswith(("libtorch", "libc10")))
    kept = [(1, name_at(b"libkept.so")), (5, ADDRESS + STRINGS), (6, 0x700)]
    assert entries_of(changed) == kept + [(0, 0)] * (len(ENTRIES) - len(kept))
    assert changed[:DYNAMIC] == library()[:DYNAMIC]
    assert len(changed) == len(library())


def test_a_change_made_twice_is_the_same() -> None:
    once = without_initializers(library(), lambda name: False)
    assert without_initializers(once, lambda name: False) == once
    assert [entry for entry in entries_of(once) if entry[0] == 1] == [entry for entry in ENTRIES if entry[0] == 1]


def test_other_files_are_refused() -> None:
    with pytest.raises(MissingToolError, match="not a 64-bit shared library"):
        without_initializers(b"\x7fELF\x01\x01" + bytes(100), lambda name: False)
    moved = [(5, ADDRESS * 2) if tag == 5 else (tag, value) for tag, value in ENTRIES]
    with pytest.raises(MissingToolError, match="the shared library is broken"):
        without_initializers(library(moved), lambda name: False)
