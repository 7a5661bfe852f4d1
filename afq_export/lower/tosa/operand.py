"""A stand-in for a tensor, so that the families' own functions in `arch/` write the TOSA graph.

What exists here is what the families use; anything else is an error rather than a silent approximation.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from afq_export.lower.tosa.graph import TosaGraph, Value
from afq_export.lower.tosa.scale import multiplier_shift
from afq_export.quantize.checkpoint import StaticRange

HALF = 32767
"""The largest 16-bit code."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """Integers of the graph and what they stand for: `real = scale * (code - zero)`."""

    graph: TosaGraph
    value: Value
    scale: float
    zero: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def view(self, *shape: int) -> Operand:
        """The same codes in another shape."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        return dataclasses.replace(self, value=self.graph.reshape(self.value, tuple(sizes)))

    reshape = view

    def permute(self, *order: int) -> Operand:
        """Dimensions in another order."""
        return dataclasses.replace(self, value=self.graph.transpose(self.value, order))

    def with_value(self, value: Value, factor: float = 1.0) -> Operand:
        """Other codes, each worth `factor` of what these were; zero point 0."""
        return Operand(self.graph, value, self.scale * factor)

    def to(self, type: str, factor: float) -> Operand:
        """Codes of `type`, each `factor` of these codes less their zero point: rounded, saturated, zero point 0."""
        multiplier, shift = multiplier_shift(factor)
        value = self.graph.rescale(self.value, type, multiplier, shift, self.zero)
        return Operand(self.graph, value, self.scale / factor)

    def on(self, grid: StaticRange) -> Operand:
        """These numbers on a stored grid: 8 bits as it is, 16 bits symmetric over its range (TOSA has no 16-bit zero
        points)."""
        step, type, zero = stored(grid)
        value = self.graph.rescale(self.value, type, *multiplier_shift(self.scale / step), self.zero, zero)
        return Operand(self.graph, value, step, zero)


def stored(grid: StaticRange) -> tuple[float, str, int]:
    """Step, type and zero point of a grid as TOSA has it: 16 bits lie around 0, over all that the grid covers."""
    if grid.bits == 8:
        return grid.scale, "i8", grid.zero_point
    largest = max(grid.qmax - grid.zero_point, grid.zero_point - grid.qmin)
    return largest * grid.scale / HALF, "i16", 0


def bits_for(count: int) -> int:
    """The least k with `count <= 2^k`."""
    return max(0, math.ceil(math.log2(count)))


def filled(shape: tuple[int, ...], value: int) -> np.ndarray:
    """A constant array."""
    return np.full(shape, value, np.int64)
