"""What all integer models share: exact dot products, and the parts of a linear that they need.

Integers are computed in float64: they are exact there, because they stay within int32 (`check_range`) and int32 within
2^53, and it is as fast as an int8 matmul is on a CPU.
"""

from __future__ import annotations

from torch import Tensor

from afq_export.errors import InputError
from afq_export.quantize.checkpoint import QuantizedLinear, StaticRange

QMIN, QMAX = -128, 127
INT32_MAX = 2**31 - 1


def dot(x_TI: Tensor, codes_OI: Tensor) -> Tensor:
    """Exact integer dot products [T, O], in float64. Raises InputError when one leaves int32."""
    return check_range(x_TI.double() @ codes_OI.double().t())


def check_range(sums: Tensor) -> Tensor:
    """`sums`, all of which the kernel's int32 holds; beyond it the kernel would wrap around and this model is wrong."""
    if sums.numel() and float(sums.abs().max()) > INT32_MAX:
        raise InputError("int32 accumulator overflows", why=f"a sum of {float(sums.abs().max()):.0f}")
    return sums


def input_grid(linear: QuantizedLinear) -> StaticRange:
    """The static grid of the input. Raises InputError when the checkpoint lacks it."""
    return _grid(linear, linear.record.input, "input")


def output_grid(linear: QuantizedLinear) -> StaticRange:
    """The static grid of the output. Raises InputError when the checkpoint lacks it."""
    return _grid(linear, linear.record.output, "output")


def _grid(linear: QuantizedLinear, grid: StaticRange | None, side: str) -> StaticRange:
    if grid is None:
        why = f"its {side} has none"
        raise InputError("no static activation range", where=linear.spec.name, why=why, do="use a static recipe")
    return grid
