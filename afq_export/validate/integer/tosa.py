"""The integer operators of TOSA 1.0, in numpy: the reference for programs in lower/tosa, and our own model of a linear.

    RESCALE        (x - input_zero) * multiplier, 2^(shift-1) added, shifted right by `shift`, zero added, clipped
    TABLE          i16: entry [x >> 7], times 128, plus (next - entry) * (x & 127)
    CONV2D         1 x 1: int32 sums of (x - zero) * code, plus bias
    the others     elementwise, or of layout only

Where the specification calls a value unpredictable (a sum outside of int32, a value too large for its shift) this
raises InputError: a program that meets one is wrong, whatever a device makes of it. Source: TOSA 1.0, chapters 2.2
(single rounding), 2.3 (TABLE), 2.4; compared operator by operator with Arm's reference model by tests/lower/tosa.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from afq_export.errors import InputError
from afq_export.lower.tosa.graph import NUMPY, RANGE, Operator, TosaGraph
from afq_export.lower.tosa.scale import multiplier_shift
from afq_export.quantize.activations import quantize_static
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.validate.integer.dot import input_grid, output_grid

Array = np.ndarray


def run_graph(graph: TosaGraph, inputs: Mapping[str, Array], keep: frozenset[str] = frozenset()) -> dict[str, Array]:
    """All outputs by name, and the values called in `keep`. Raises InputError for what a program must not do."""
    values: dict[str, Array] = dict(graph.constants) | dict(inputs)
    last = {name: index for index, operator in enumerate(graph.operators) for name in operator.inputs}
    kept = keep | set(graph.outputs) | set(graph.constants)
    for index, operator in enumerate(graph.operators):
        result = graph.values[operator.output]
        found = evaluate(operator, [values[name] for name in operator.inputs], result.type)
        if found.shape != result.shape:
            raise InputError("a result has another shape", where=operator.output, why=f"{found.shape}, {result.shape}")
        values[operator.output] = found
        for name in operator.inputs:
            if last[name] == index and name not in kept:
                del values[name]
                last[name] = -1
    return {name: values[name] for name in kept if name not in graph.constants}


def evaluate(operator: Operator, arrays: list[Array], type: str) -> Array:
    """One operator on its operands; `type` is the result's."""
    function = OPERATORS.get(operator.kind)
    if function is None:
        raise InputError("no model of the operator", where=operator.output, why=operator.kind)
    try:
        return fits(function(arrays, operator.attributes, type), type)
    except InputError as error:
        raise InputError(error.what, where=operator.output, why=error.why) from error


def fits(exact: Array, type: str) -> Array:
    """Exact integers (int64, or whole float64) as `type`. Raises InputError when one lies outside."""
    low, high = RANGE[type]
    if exact.size and (exact.min() < low or exact.max() > high):
        raise InputError("a value leaves its type", why=f"{exact.min()} to {exact.max()} in {type}")
    return exact.astype(NUMPY[type])


def rescale(x: Array, multiplier: Array, shift: Array, low: int, high: int, input_zero: int = 0, output_zero: int = 0):
    """int64 codes in [low, high]: RESCALE with 32-bit multipliers and single rounding."""
    value, shift = x.astype(np.int64) - input_zero, shift.astype(np.int64)
    if ((shift < 2) | (shift > 62) | (multiplier < 0)).any():
        raise InputError("RESCALE takes shifts from 2 to 62 and no negative multiplier", why=f"{shift}, {multiplier}")
    limit = np.int64(1) << (shift - 1)
    if ((value < -limit) | (value >= limit)).any():
        raise InputError("a value is too large for its shift", why=f"{np.abs(value).max()} by {shift}")
    scaled = (value * multiplier.astype(np.int64) + limit) >> shift
    return np.clip(scaled + output_zero, low, high)


def table(x: Array, entries: Array) -> Array:
    """int64, 23 bits: the 16-bit lookup with linear interpolation."""
    x, entries = x.astype(np.int64), entries.astype(np.int64)
    index, fraction = (x + 32768) >> 7, x & 127
    base = entries[index]
    slope = entries[index + 1] - base
    if slope.size and np.abs(slope).max() > 32767:
        raise InputError("a table's slope leaves 16 bits", why=str(np.abs(slope).max()))
    return (base << 7) + slope * fraction


def leading_zeros(x: Array) -> Array:
    """Zero bits before the first one of 32."""
    bits = x.astype(np.int64) & 0xFFFFFFFF
    return 32 - np.frexp(bits.astype(np.float64))[1].astype(np.int64) * (bits > 0)


def product(a: Array, b: Array) -> Array:
    """Matrix products of small integers: exact in float64 as long as sums stay below 2^53, which `fits` sees to."""
    return a.astype(np.float64) @ b.astype(np.float64)


def _conv2d(arrays: list[Array], attributes, type: str) -> Array:
    image, weight, bias, zero, weight_zero = arrays
    weight_OI = weight.reshape(weight.shape[0], -1).astype(np.int64) - weight_zero
    sums = product(image.reshape(-1, image.shape[-1]).astype(np.int64) - zero, weight_OI.T) + bias
    return sums.reshape(*image.shape[:3], len(weight_OI))


def _rescale(arrays: list[Array], attributes, type: str) -> Array:
    x, multiplier, shift, input_zero, output_zero = arrays
    return rescale(x, multiplier, shift, *RANGE[type], int(input_zero[0]), int(output_zero[0]))


def _slice(arrays: list[Array], attributes, type: str) -> Array:
    x, start, size = arrays
    return x[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]


def _shift_left(arrays: list[Array], attributes, type: str) -> Array:
    a, b = (array.astype(np.int64) for array in arrays)
    if b.size and (b.min() < 0 or b.max() > 31):
        raise InputError("a shift outside of 0 to 31", why=f"{b.min()} to {b.max()}")
    return a << b


def _wide(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda arrays, attributes, type: function(*(array.astype(np.int64) for array in arrays[:2]))


OPERATORS: dict[str, Callable[[list[Array], Mapping, str], Array]] = {
    "CONV2D": _conv2d,
    "MATMUL": lambda a, _, __: product(a[0].astype(np.int64) - a[2], a[1].astype(np.int64) - a[3]),
    "RESCALE": _rescale,
    "TABLE": lambda a, _, __: table(*a),
    "ADD": _wide(np.add),
    "SUB": _wide(np.subtract),
    "MUL": _wide(np.multiply),
    "LOGICAL_LEFT_SHIFT": _shift_left,
    "ARITHMETIC_RIGHT_SHIFT": _wide(np.right_shift),
    "CLZ": lambda a, _, __: leading_zeros(a[0]),
    "REDUCE_SUM": lambda a, options, _: a[0].astype(np.int64).sum(options["axis"], keepdims=True),
    "REDUCE_MAX": lambda a, options, _: a[0].max(options["axis"], keepdims=True),
    "CONCAT": lambda a, options, _: np.concatenate(a, options["axis"]),
    "SLICE": _slice,
    "RESHAPE": lambda a, _, __: a[0].reshape(a[1]),
    "TRANSPOSE": lambda a, options, _: a[0].transpose(options["perms"]),
    "IDENTITY": lambda a, _, __: a[0],
}
"""Operator -> its exact result as int64 or whole float64 (or, where nothing is computed, as it came)."""


def static(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """A linear as programs of lower/tosa compute it: CONV2D on int8 codes, RESCALE per row. Dequantized float32 [T, O].

    The output's grid is the stored one in 8 bits; in 16 bits it lies around 0, over all that the stored one covers.
    """
    source, target = input_grid(linear), output_grid(linear)
    scales_O = source.scale * linear.scales[:, 0].double().numpy()
    codes_TI = quantize_static(x_TI, source).numpy().astype(np.int64) - source.zero_point
    sums_TO = fits(product(codes_TI, linear.codes.numpy().T), "i32").astype(np.int64)
    if linear.bias is not None:
        sums_TO = fits(sums_TO + np.rint(linear.bias.double().numpy() / scales_O), "i32")
    step, zero = target.scale, target.zero_point
    if target.bits == 16:
        step, zero = max(target.qmax - zero, zero - target.qmin) * step / target.qmax, 0
    codes_TO = rescale(sums_TO, *multiplier_shift(scales_O / step), target.qmin, target.qmax, 0, zero)
    return torch.from_numpy((codes_TO - zero).astype(np.float32)) * step
