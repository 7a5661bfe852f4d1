"""Activations on a grid, with the arithmetic of the kernels that do it at run time.

`dynamic_grid` is XNNPACK's (ExecuTorch 1.5): float32 throughout, one grid per token row, zero always representable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afq_export.quantize.checkpoint import StaticRange
from afq_export.spec.quant import QuantSpec


def dynamic_grid(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """`(inverse step, zero point)` [..., 1] per row of x [..., I]: code = round(x * inverse) + zero_point."""
    low = x.amin(-1, keepdim=True).clamp_max(0.0)
    high = x.amax(-1, keepdim=True).clamp_min(0.0)
    levels = float(spec.qmax - spec.qmin)
    inverse = torch.where(high > low, levels / (high - low), torch.ones_like(low))
    from_low, from_high = spec.qmin - low * inverse, spec.qmax - high * inverse
    # The end whose rounding error is the smaller decides, as in XNNPACK's xnn_f32_qd8_asymmetric_quantization_params.
    error = (spec.qmin + low * inverse) + (spec.qmax + high * inverse)
    zero = torch.where(error > 0, from_low, from_high).clamp(spec.qmin, spec.qmax).round()
    return inverse, zero


def dynamic_codes(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`(codes, step, zero point)` with codes integers in float [..., I] and step = 1 / inverse [..., 1]."""
    inverse, zero = dynamic_grid(x, spec)
    codes = (x * inverse).round_().add_(zero).clamp_(spec.qmin, spec.qmax)
    return codes, 1.0 / inverse, zero


def static_codes(x: Tensor, grid: StaticRange, qmin: int = -128, qmax: int = 127) -> Tensor:
    """Codes (integers in float) of x on a per-tensor grid; the step's float32 inverse multiplies, as in XNNPACK."""
    inverse = torch.tensor(1.0, dtype=torch.float32) / torch.tensor(grid.scale, dtype=torch.float32)
    return (x * inverse).round_().add_(grid.zero_point).clamp_(qmin, qmax)


def fake_quantize_dynamic(x: Tensor, spec: QuantSpec) -> Tensor:
    """x on its own per-token grid; the gradient is the identity, since a dynamic range clips nothing."""
    return _StraightThrough.apply(x, lambda v: _dequantize(*dynamic_codes(v, spec)))


def fake_quantize_static(x: Tensor, grid: StaticRange) -> Tensor:
    """x on a fixed grid; gradients pass inside the range only."""
    low, high = (-128 - grid.zero_point) * grid.scale, (127 - grid.zero_point) * grid.scale
    clamped = x.clamp(low, high) if x.requires_grad else x
    return _StraightThrough.apply(clamped, lambda v: (static_codes(v, grid) - grid.zero_point) * grid.scale)


def range_grid(low: float, high: float, qmin: int = -128, qmax: int = 127) -> StaticRange:
    """The grid that covers [low, high] and has a code for zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(torch.tensor((high - low) / (qmax - qmin) or 1.0, dtype=torch.float32).clamp_min(2.0**-100))
    zero = round(qmin - low / scale)
    return StaticRange(scale, max(qmin, min(qmax, zero)))


def _dequantize(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    return codes.sub_(zero).mul_(step)


class _StraightThrough(torch.autograd.Function):
    """Any elementwise rounding; the gradient passes unchanged and nothing is saved."""

    @staticmethod
    def forward(ctx, x: Tensor, function) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None
