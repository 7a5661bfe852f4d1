"""A TOSA graph: operators in running order, tensors by name, constants in numpy.

Types are named as in the specification: i8, i16, i32. Every method appends one operator and infers its result's shape
and type. Source: TOSA 1.0 specification, chapter 2, profile PRO-INT with EXT-INT16 (for TABLE). 4-bit weights are i8 as
well: the specification's i4 has no -8, which our grids use, and Vela compresses weights whatever their type is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

NUMPY = {"i8": np.int8, "i16": np.int16, "i32": np.int32}
"""Type of the specification -> the array that holds its values."""

RANGE = {name: (np.iinfo(dtype).min, np.iinfo(dtype).max) for name, dtype in NUMPY.items()}
"""Least and largest value of a type."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the graph."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator with one result. `inputs` in the order of the specification, attributes by its names."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class TosaGraph:
    """Collects operators. Names are unique; `scope` stands in front of those that nobody chose."""

    def __init__(self, scope: str = "model") -> None:
        self.scope = scope
        self.values: dict[str, Value] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.operators: list[Operator] = []
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self._shared: dict[tuple, Value] = {}
        self._taken: dict[str, int] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is appended inside belongs to `name` of the current scope."""
        outer, self.scope = self.scope, f"{self.scope}.{name}".lstrip(".")
        try:
            yield
        finally:
            self.scope = outer

    def input(self, name: str, type: str, shape: tuple[int, ...]) -> Value:
        """A tensor that the caller gives."""
        self.inputs.append(name)
        return self._value(name, type, shape)

    def output(self, value: Value, name: str) -> Value:
        """A result called `name`: an IDENTITY of `value`."""
        self.outputs.append(name)
        result = self._value(name, value.type, value.shape)
        self.operators.append(Operator("IDENTITY", (value.name,), name))
        return result

    def constant(self, array: np.ndarray, type: str, name: str = "") -> Value:
        """A constant; unnamed ones are shared when they are equal."""
        array = np.ascontiguousarray(array, NUMPY[type])
        key = (type, array.shape, array.tobytes())
        if name or key not in self._shared:
            value = self._value(self._unique(name or "constant"), type, array.shape)
            self.constants[value.name] = array
            if name:
                return value
            self._shared[key] = value
        return self._shared[key]

    def sizes(self, numbers: tuple[int, ...]) -> Value:
        """A constant of type `shape`."""
        key = ("shape", numbers)
        if key not in self._shared:
            value = self._value(self._unique("sizes"), "shape", (len(numbers),))
            self.constants[value.name] = np.array(numbers, np.int64)
            self._shared[key] = value
        return self._shared[key]

    def conv2d(self, x: Value, weight_OI: np.ndarray, bias_O: np.ndarray, zero_point: int) -> Value:
        """A linear on `x` i8 [T, I] as a 1 x 1 convolution: its int32 sums [1, T, 1, O], bias included.

        `bias_O` is in units of a product.
        """
        (tokens, inputs), outputs = x.shape, len(weight_OI)
        weight = self.constant(weight_OI.reshape(outputs, 1, 1, inputs), "i8", "codes")
        bias = self.constant(bias_O, "i32", "bias")
        image = self.reshape(x, (1, tokens, 1, inputs))
        operands = [image, weight, bias, self._zero_point("i8", zero_point), self._zero_point("i8", 0)]
        return self._append("CONV2D", operands, "i32", (1, tokens, 1, outputs))

    def matmul(self, a: Value, b: Value, a_zero: int = 0, b_zero: int = 0) -> Value:
        """i8 [N, H, C] times i8 [N, C, W], less their zero points: i32 [N, H, W]."""
        (n, h, c), (n2, c2, w) = a.shape, b.shape
        assert (n, c, a.type, b.type) == (n2, c2, "i8", "i8"), (a, b)
        zeros = [self._zero_point("i8", a_zero), self._zero_point("i8", b_zero)]
        return self._append("MATMUL", [a, b, *zeros], "i32", (n, h, w))

    def rescale(
        self,
        x: Value,
        type: str,
        multiplier: np.ndarray,
        shift: np.ndarray,
        input_zero: int = 0,
        output_zero: int = 0,
    ) -> Value:
        """`clip(((x - input_zero) * multiplier + 2^(shift-1)) >> shift) + output_zero`; per last dimension when the
        multipliers are several."""
        assert len(multiplier) in (1, x.shape[-1]) and len(multiplier) == len(shift)
        operands = [
            x,
            self.constant(multiplier, "i32"),
            self.constant(shift, "i8"),
            self._zero_point(x.type, input_zero),
            self._zero_point(type, output_zero),
        ]
        return self._append("RESCALE", operands, type, x.shape, per_channel=len(multiplier) > 1)

    def table(self, x: Value, entries: np.ndarray) -> Value:
        """i16 through 513 entries of 16 bits: i32, 7 more bits, interpolated between entries."""
        assert x.type == "i16" and entries.shape == (513,)
        return self._append("TABLE", [x, self.constant(entries, "i16")], "i32", x.shape)

    def add(self, a: Value, b: Value) -> Value:
        """i32 sums; dimensions of size 1 are broadcast."""
        return self._binary("ADD", a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        """i32 differences; dimensions of size 1 are broadcast."""
        return self._binary("SUB", a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        """i16 or i32 factors, i32 products."""
        return self._binary("MUL", a, b, [self._zero_point("i8", 0)])

    def shift_left(self, a: Value, b: Value) -> Value:
        """i32 `a << b`, 0 <= b <= 31; dimensions of size 1 are broadcast."""
        return self._binary("LOGICAL_LEFT_SHIFT", a, b)

    def shift_right(self, a: Value, b: Value) -> Value:
        """i32 `a >> b` with the sign, not rounded."""
        return self._binary("ARITHMETIC_RIGHT_SHIFT", a, b)

    def leading_zeros(self, x: Value) -> Value:
        """i32: zero bits before the first one."""
        return self._append("CLZ", [x], "i32", x.shape)

    def reduce(self, kind: str, x: Value) -> Value:
        """REDUCE_SUM or REDUCE_MAX over the last dimension, which is 1 afterwards."""
        axis = len(x.shape) - 1
        return self._append(kind, [x], x.type, (*x.shape[:-1], 1), axis=axis)

    def concat(self, parts: list[Value], axis: int) -> Value:
        """The parts one after the other along `axis`."""
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self._append("CONCAT", parts, parts[0].type, tuple(shape), axis=axis)

    def slice(self, x: Value, start: tuple[int, ...], size: tuple[int, ...]) -> Value:
        """The box of `size` that begins at `start`."""
        return self._append("SLICE", [x, self.sizes(start), self.sizes(size)], x.type, size)

    def reshape(self, x: Value, shape: tuple[int, ...]) -> Value:
        """The same elements in another shape; nothing is written when it is the same."""
        if x.shape == shape:
            return x
        assert math.prod(shape) == x.elements, (x, shape)
        return self._append("RESHAPE", [x, self.sizes(shape)], x.type, shape)

    def transpose(self, x: Value, order: tuple[int, ...]) -> Value:
        """Dimensions in another order."""
        return self._append("TRANSPOSE", [x], x.type, tuple(x.shape[i] for i in order), perms=list(order))

    def _zero_point(self, type: str, value: int) -> Value:
        return self.constant(np.array([value]), type)

    def _binary(self, kind: str, a: Value, b: Value, more: list[Value] | None = None) -> Value:
        assert len(a.shape) == len(b.shape) and a.type == b.type, (a, b)
        shape = np.broadcast_shapes(a.shape, b.shape)
        return self._append(kind, [a, b, *(more or [])], "i32", shape)

    def _append(self, kind: str, operands: list[Value], type: str, shape: tuple[int, ...], **attributes: Any) -> Value:
        result = self._value(self._unique(kind.lower()), type, shape)
        self.operators.append(Operator(kind, tuple(o.name for o in operands), result.name, attributes))
        return result

    def _value(self, name: str, type: str, shape: tuple[int, ...]) -> Value:
        assert name not in self.values, name
        self.values[name] = Value(name, type, tuple(int(size) for size in shape))
        return self.values[name]

    def _unique(self, name: str) -> str:
        full = ".".join(part for part in (self.scope, name) if part)
        count = self._taken[full] = self._taken.get(full, 0) + 1
        return full if count == 1 else f"{full}.{count}"
