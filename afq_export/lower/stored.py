"""A quantized linear as it stands in a file, whatever the format, and how two of them differ."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from afq_export.quantize.checkpoint import StaticRange


class Stored(Protocol):
    """`kind` is what the format calls the kernel; codes int8 [O, I], scales float32 [O, G], bias [O] or None, and the
    stored grids of input and output."""

    @property
    def kind(self) -> str: ...

    @property
    def codes(self) -> np.ndarray: ...

    @property
    def scales(self) -> np.ndarray: ...

    @property
    def bias(self) -> np.ndarray | None: ...

    @property
    def input(self) -> StaticRange | None: ...

    @property
    def output(self) -> StaticRange | None: ...


@dataclasses.dataclass(frozen=True)
class StoredLinear:
    """`Stored`, with everything at hand. `weight` and `activation` are the grids in words."""

    kind: str
    codes: np.ndarray = dataclasses.field(repr=False)
    scales: np.ndarray = dataclasses.field(repr=False)
    bias: np.ndarray | None = None
    input: StaticRange | None = None
    output: StaticRange | None = None
    weight: str = ""
    activation: str = ""


def difference(expected: Stored, found: Stored) -> str:
    """Which property differs, to the bit; empty when none does."""
    if expected.kind != found.kind:
        return f"kernel {found.kind} instead of {expected.kind}"
    if not np.array_equal(expected.codes, found.codes):
        return "codes differ"
    if not np.array_equal(expected.scales, found.scales):
        return "scales differ"
    if (expected.bias is None) != (found.bias is None):
        return "bias is missing" if found.bias is None else "a bias was added"
    if expected.bias is not None and not np.array_equal(expected.bias, found.bias):
        return "bias differs"
    grids = {"input": (expected.input, found.input), "output": (expected.output, found.output)}
    return next((f"{side} grid differs" for side, (grid, stored) in grids.items() if not _same(grid, stored)), "")


def _same(grid: StaticRange | None, stored: StaticRange | None) -> bool:
    """Whether two static grids are one, in the precision of the file (float32 scale)."""
    if grid is None or stored is None:
        return grid is stored
    return np.float32(grid.scale) == np.float32(stored.scale) and grid.zero_point == stored.zero_point
