"""Programs and shared libraries: which machine they are for, and one change to a library, after which it loads without
some libraries that it names and runs nothing when it does.

Fields are those of the ELF specification (elf.h): header, program headers, and the dynamic section's tags.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from afq_export.errors import InputError, MissingToolError

MAGIC = b"\x7fELF\x02\x01"
"""64 bits, little-endian."""
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5
INITIALIZERS = frozenset((12, 13, 25, 26, 27, 28))
"""DT_INIT, DT_FINI, and the arrays of both with their sizes."""
MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
"""e_machine -> the name that uname has."""
_ENTRY = struct.Struct("<QQ")


def machine_of(path: Path) -> str:
    """The machine that a program is for, as uname has it; empty for what is no ELF file. Raises InputError."""
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError as error:
        raise InputError("cannot read the program", where=str(path), why=error.strerror or str(error)) from error
    if not head.startswith(MAGIC[:4]) or len(head) < 20:
        return ""
    (machine,) = struct.unpack_from("<H", head, 18)
    return MACHINES.get(machine, f"machine {machine}")


def without_initializers(library: bytes, leave_out: Callable[[str], bool]) -> bytes:
    """A copy that needs none of the libraries `leave_out` is true for, and has no initializers and finalizers.

    Symbols of what is left out stay undefined: fine where binding is lazy and nothing that uses them is called.
    Raises MissingToolError when `library` is no such file.
    """
    if not library.startswith(MAGIC):
        raise MissingToolError("not a 64-bit shared library")
    segments = _segments(library)
    offset, size = next((offset, size) for kind, offset, _, size in segments if kind == PT_DYNAMIC)
    entries = [_ENTRY.unpack_from(library, at) for at in range(offset, offset + size, _ENTRY.size)]
    names = _file_offset(segments, dict(entries)[DT_STRTAB])

    def stays(tag: int, value: int) -> bool:
        if tag == DT_NEEDED:
            start = names + value
            return not leave_out(library[start : library.index(b"\0", start)].decode())
        return tag not in INITIALIZERS and tag != DT_NULL

    kept = [entry for entry in entries if stays(*entry)]
    kept += [(DT_NULL, 0)] * (len(entries) - len(kept))
    dynamic = b"".join(_ENTRY.pack(*entry) for entry in kept)
    return library[:offset] + dynamic + library[offset + len(dynamic) :]


def _segments(library: bytes) -> list[tuple[int, int, int, int]]:
    """Kind, offset in the file, address and size in the file of every program header."""
    (table,) = struct.unpack_from("<Q", library, 32)
    width, count = struct.unpack_from("<HH", library, 54)
    headers = (struct.unpack_from("<IIQQQQ", library, table + index * width) for index in range(count))
    return [(kind, offset, address, size) for kind, _, offset, address, _, size in headers]


def _file_offset(segments: list[tuple[int, int, int, int]], address: int) -> int:
    """Where in the file the byte at `address` is."""
    for kind, offset, start, size in segments:
        if kind == PT_LOAD and start <= address < start + size:
            return offset + address - start
    raise MissingToolError("the shared library is broken", why="its names lie in no segment")
