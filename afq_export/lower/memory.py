"""Memory that a board has: programs that do not fit are refused with figures."""

from __future__ import annotations

from typing import Protocol

from afq_export.errors import InputError


class Board(Protocol):
    """The options of a target that has so much memory and no more (spec/target.py)."""

    @property
    def flash_kb(self) -> int: ...

    @property
    def sram_kb(self) -> int: ...


def refuse_memory(
    board: Board, table: str, flash: int, sram: int, where: str, *, smaller: str, least: str = ""
) -> None:
    """Raises InputError when `flash` or `sram` bytes are more than `board`, the target's `table`, has.

    `smaller` says what else there is to make smaller; `least` stands before a figure that is a lower bound.
    """
    for name, needed, there in (("flash", flash, board.flash_kb), ("SRAM", sram, board.sram_kb)):
        if needed > there * 1024:
            raise InputError(
                f"the program does not fit into the target's {name}",
                where=where,
                why=f"it takes {least}{needed / 1024:,.0f} KiB, {table}.{name.lower()}_kb is {there:,}",
                do=f"take a smaller model, {smaller}, or a target of your own whose [{table}] is your board's",
            )
