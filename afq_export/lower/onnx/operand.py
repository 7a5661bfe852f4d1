"""A stand-in for a tensor, so that the families' own functions in `arch/` write the ONNX graph.

What exists here is what the families use; anything else is an error rather than a silent approximation.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from afq_export.errors import InputError
from afq_export.lower.onnx.graph import OnnxGraph

Shape = tuple[int | str, ...]
"""Sizes; the dynamic ones, always in front, are names."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """A value of a graph. `shape` is what the family sees, `stored` what the value has in the file.

    `view` changes `shape` only: a node is written when an operator needs the shape in earnest (`as_stored`), and
    rotary embedding and attention take heads side by side, so that none is needed in most models.
    """

    graph: OnnxGraph
    value: str
    shape: Shape
    stored: Shape

    @staticmethod
    def of(graph: OnnxGraph, value: str, shape: Shape) -> Operand:
        """A value of the file as it is."""
        return Operand(graph, value, shape, shape)

    def view(self, *shape: int | str | Shape) -> Operand:
        """As in torch, but every size is given: dynamic ones as they were taken from another shape."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        if _count(tuple(sizes)) != _count(self.shape):
            raise InputError("a view of another size", where=self.value, why=f"{self.shape} as {tuple(sizes)}")
        return dataclasses.replace(self, shape=tuple(sizes))

    reshape = view

    def as_stored(self, shape: Shape) -> str:
        """The name of this value in `shape`: a Reshape is written unless the file has it so."""
        if self.stored == shape:
            return self.value
        sizes = [0 if isinstance(size, str) else size for size in shape]
        return self.graph.node("Reshape", [self.value, self.graph.integers(*sizes)])

    def __add__(self, other: Operand | int | float) -> Operand:
        return self._binary("Add", other)

    def __mul__(self, other: Operand | int | float) -> Operand:
        return self._binary("Mul", other)

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, rows: Operand) -> Operand:
        """Rows of a table [V, D] by index [B, T]: [B, T, D]."""
        value = self.graph.node("Gather", [self.value, rows.value], axis=0)
        return Operand.of(self.graph, value, (*rows.shape, *self.shape[1:]))

    def unary(self, operator: str, **attributes: object) -> Operand:
        """An elementwise operator."""
        return Operand.of(self.graph, self.graph.node(operator, [self.as_stored(self.shape)], **attributes), self.shape)

    def _binary(self, operator: str, other: Operand | int | float) -> Operand:
        if isinstance(other, Operand):
            right = other.as_stored(other.shape)
        else:
            dtype = np.int64 if isinstance(other, int) else np.float32
            right = self.graph.constant(np.array(other, dtype), "number")
        return Operand.of(self.graph, self.graph.node(operator, [self.as_stored(self.shape), right]), self.shape)


def activate(name: str, x: Operand) -> Operand:
    """The nonlinearity called `name`. Raises InputError for an unknown one."""
    match name:
        case "relu":
            return x.unary("Relu")
        case "silu":
            return x * x.unary("Sigmoid")
        case "gelu":
            return x.unary("Gelu", approximate="none")
        case "gelu_tanh":
            return x.unary("Gelu", approximate="tanh")
    raise InputError("no ONNX form of the nonlinearity", why=f"got {name!r}")


def _count(shape: Shape) -> tuple:
    """The dynamic sizes and the product of the others."""
    return tuple(size for size in shape if isinstance(size, str)), math.prod(s for s in shape if isinstance(s, int))
