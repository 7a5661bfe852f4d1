"""Which kernels ran: read off the instructions that the emulator had to translate.

qemu logs an instruction when it translates it, that is before it runs for the first time: what is in the log was
executed, and how often is not known. Only instructions inside the runtime's own libraries are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

FAMILIES = {
    "sme": ("smopa", "umopa", "usmopa", "sumopa", "fmopa", "bfmopa"),
    "i8mm": ("smmla", "ummla", "usmmla"),
    "dotprod": ("sdot", "udot", "usdot", "sudot"),
    "neon": ("smlal", "smlal2", "umlal", "umlal2", "smull", "smull2", "umull", "umull2"),
    "float": ("fmla",),
}
"""Kernel family -> what only its inner loops multiply with, from the most to the least advanced (Arm ARM, DDI 0487)."""

_COUNTED = {mnemonic: family for family, mnemonics in FAMILIES.items() for mnemonic in mnemonics}
_LINE = re.compile(rb"0x([0-9a-f]+):\s+[0-9a-f]{8}\s+([a-z0-9]+)\s+[vz]")
"""Address and mnemonic of an instruction on vector or matrix registers: `umull` on others is address arithmetic."""

Code = Sequence[tuple[str, int, int]]
"""File, start and end of executable mappings."""


def count_instructions(log: Path, code: Code, libraries: Iterable[str]) -> dict[str, int]:
    """Mnemonic -> distinct addresses in a log of `qemu -d in_asm`, of libraries whose names begin like `libraries`."""
    beginnings = tuple(libraries)
    ranges = [(start, end) for name, start, end in code if name.startswith(beginnings)]
    addresses: dict[str, set[int]] = {}
    with log.open("rb") as lines:
        for line in lines:
            match = _LINE.match(line)
            if not match or (mnemonic := match[2].decode()) not in _COUNTED:
                continue
            address = int(match[1], 16)
            if any(start <= address < end for start, end in ranges):
                addresses.setdefault(mnemonic, set()).add(address)
    return {mnemonic: len(addresses[mnemonic]) for mnemonic in _COUNTED if mnemonic in addresses}


def family_of(instructions: dict[str, int]) -> str:
    """The most advanced family of which an instruction ran; "scalar" when none did."""
    return next((family for family, names in FAMILIES.items() if any(map(instructions.get, names))), "scalar")
