"""A stand-in for a tensor, so that the families' own functions in `arch/` write the XNNPACK graph.

`arch.llama.attention_in(config, ops, x, rope)` runs unchanged with `Operand`s for tensors: each operation appends a
node. What exists here is what the families use; anything else is an error rather than a silent approximation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn

from afq_export.errors import InputError
from afq_export.lower.executorch.graph import Shape, XnnGraph


@dataclasses.dataclass(frozen=True)
class Operand:
    """A float32 value of a graph."""

    graph: XnnGraph
    value: int

    @property
    def shape(self) -> Shape:
        """Sizes; the dynamic one is `Tokens`."""
        return self.graph.shapes[self.value]

    def __add__(self, other: Operand | float) -> Operand:
        return self._binary(xnn.XNNAdd, other)

    def __sub__(self, other: Operand | float) -> Operand:
        return self._binary(xnn.XNNSubtract, other)

    def __mul__(self, other: Operand | float) -> Operand:
        return self._binary(xnn.XNNMultiply, other)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Operand:
        return self._unary(xnn.XNNNegate)

    def rsqrt(self) -> Operand:
        """1 / sqrt(x)."""
        return self._unary(xnn.XNNReciprocalSquareRoot)

    def mean_last(self) -> Operand:
        """Mean over the last dimension, kept as 1."""
        return self._new(self.graph.mean_last(self.value))

    def view(self, *shape: int | Shape) -> Operand:
        """As in torch, but every size is given: the dynamic one as the `Tokens` taken from another shape."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        return self._new(self.graph.reshape(self.value, tuple(sizes)))

    reshape = view

    def __getitem__(self, index: Any) -> Operand:
        """`x[..., a:b]` on the last dimension, and `x[:, None, :]`, which inserts a dimension of 1."""
        match index:
            case (builtins_ellipsis, slice(start=start, stop=stop, step=None)) if builtins_ellipsis is ...:
                begin, end, _ = slice(start, stop).indices(self.shape[-1])
                return self._new(self.graph.slice_last(self.value, begin, end - begin))
            case tuple() if all(part is None or part == slice(None) for part in index):
                sizes = iter(self.shape)
                return self.view(tuple(1 if part is None else next(sizes) for part in index))
        raise InputError("an index that has no XNNPACK node", why=f"{index!r} on shape {tuple(self.shape)}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Operand:
        """`torch.cat` of two operands along the last dimension; nothing else of torch applies."""
        if function is torch.cat and (kwargs or {}).get("dim") == -1 and len(args[0]) == 2:
            left, right = args[0]
            return left._new(left.graph.concatenate_last(left.value, right.value))
        return NotImplemented

    def _binary(self, kind: type, other: Operand | float) -> Operand:
        right = other.value if isinstance(other, Operand) else self.graph.constant(np.array([other]))
        return self._new(self.graph.binary(kind, self.value, right))

    def _unary(self, kind: type) -> Operand:
        return self._new(self.graph.unary(kind, self.value))

    def _new(self, value: int) -> Operand:
        return Operand(self.graph, value)


def activate(name: str, x: Operand) -> Operand:
    """The nonlinearity called `name`, in XNNPACK's nodes. Raises InputError for an unknown one."""
    match name:
        case "relu":
            return x._new(x.graph.relu(x.value))
        case "silu":
            return x * x._unary(xnn.XNNSigmoid)
        case "gelu":
            return x._unary(xnn.XNNGelu)
        case "gelu_tanh":
            inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
            return x * 0.5 * (inner._unary(xnn.XNNTanh) + 1.0)
    raise InputError("no XNNPACK form of the nonlinearity", why=f"got {name!r}")
