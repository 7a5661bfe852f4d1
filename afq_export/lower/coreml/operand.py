"""A stand-in for a tensor, so that the families' own functions in `arch/` write the Core ML program.

What exists here is what the families use; anything else is an error rather than a silent approximation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from coremltools.converters.mil import Builder as mb

TOKENS = -1
"""The size that changes from call to call, as `reshape` has it."""

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """A float16 value of the program. At most one size of `shape` is TOKENS."""

    value: Any
    shape: Shape

    def view(self, *shape: int | Shape) -> Operand:
        """As in torch; the dynamic size is the TOKENS taken from another shape."""
        sizes: Any = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        return Operand(mb.reshape(x=self.value, shape=list(sizes)), tuple(sizes))

    reshape = view

    def __add__(self, other: Operand) -> Operand:
        return Operand(mb.add(x=self.value, y=other.value), self.shape)

    def __mul__(self, other: Operand) -> Operand:
        return Operand(mb.mul(x=self.value, y=other.value), self.shape)

    def to(self, value: Any) -> Operand:
        """`value` in this shape."""
        return Operand(value, self.shape)
