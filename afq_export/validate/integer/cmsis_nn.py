"""The arithmetic of CMSIS-NN's int8 convolution, which a linear with a scale per output row is run as.

    code = clamp(requantized(sum((x - zx) * w) + bias) + zy),  all in int32

The bias is in units of one product. `requantized` multiplies by sx * ws / sy, kept as a 31-bit multiplier and a power
of two: a doubling high product, rounded half up, then a shift, rounded half away from zero. Source: CMSIS-NN's
arm_nn_requantize as ExecuTorch 1.5 describes it (backends/cortex_m), compared by tests/lower/cortex_m.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afq_export.quantize.activations import dequantize_static, quantize_static
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.validate.integer.dot import QMAX, QMIN, check_range, dot, input_grid, output_grid

ONE = 1 << 31
"""A multiplier of 1."""


def static_per_channel(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """Quantize, convolve, requantize, dequantize: float32 [T, O]."""
    source, target = input_grid(linear), output_grid(linear)
    sums_TO = dot(quantize_static(x_TI, source) - source.zero_point, linear.codes)
    bias_O = bias_steps(linear)
    sums_TO = sums_TO if bias_O is None else check_range(sums_TO + bias_O)
    multipliers_O, shifts_O = requantization(linear)
    codes_TO = requantized(sums_TO.long(), multipliers_O, shifts_O) + target.zero_point
    return dequantize_static(codes_TO.clamp(QMIN, QMAX).float(), target)


def bias_steps(linear: QuantizedLinear) -> Tensor | None:
    """The bias in units of the accumulator, int32 [O]."""
    if linear.bias is None:
        return None
    return (linear.bias.double() / (input_grid(linear).scale * linear.scales[:, 0].double())).round().to(torch.int32)


def requantization(linear: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Multiplier in units of 2^-31 and shift to the left of each row, int32 [O]."""
    source, target = input_grid(linear).scale, output_grid(linear).scale
    pairs = [_fixed(source * scale / target) for scale in linear.scales[:, 0].double().tolist()]
    multipliers, shifts = zip(*pairs, strict=True)
    return torch.tensor(multipliers, dtype=torch.int32), torch.tensor(shifts, dtype=torch.int32)


def requantized(sums: Tensor, multipliers: Tensor, shifts: Tensor) -> Tensor:
    """int64 `sums * multiplier / 2^31 * 2^shift` with CMSIS-NN's two roundings."""
    left, right = shifts.clamp(min=0).long(), (-shifts).clamp(min=0).long()
    high = ((sums << left) * multipliers.long() + (ONE >> 1)) >> 31
    mask = (torch.ones_like(right) << right) - 1
    threshold = (mask >> 1) + (high < 0)
    return (high >> right) + ((high & mask) > threshold)


def _fixed(scale: float) -> tuple[int, int]:
    mantissa, shift = math.frexp(scale)
    multiplier = round(mantissa * ONE)
    return (ONE >> 1, shift + 1) if multiplier == ONE else (multiplier, shift)
