"""Activations on a grid, with the arithmetic of the kernels that do it at run time: the one definition that
calibration learns against, fake quantization uses, and the integer models start from.

Every operation is float32, one after the other. The grid says whose arithmetic it is: asymmetric per token is XNNPACK's
(ExecuTorch 1.5), symmetric per token the nodes that our ONNX files have, symmetric per group ONNX Runtime's MatMulNBits
at accuracy level 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from afq_export.quantize.checkpoint import StaticRange
from afq_export.spec.quant import Granularity, QuantSpec

INT8 = QuantSpec(8, Granularity.PER_TOKEN, symmetric=False, dynamic=True)


LEAST_LARGEST = 2.0**-90
"""The largest |x| that a symmetric grid is made for at least, so that its step is a normal float32."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """Activations on grids of their own: `x ~ step * (code - zero_point)`.

    `codes` [..., I], or [..., G, g] on a grid per group, and `zero_point` [..., 1] are whole numbers held in float32;
    `step` [..., 1] is float32. `width` is I; `grouped`: a grid per group.
    """

    codes: Tensor
    zero_point: Tensor
    step: Tensor
    width: int
    grouped: bool = False

    def dequantized(self) -> Tensor:
        """Float32 [..., I]."""
        values = (self.codes - self.zero_point) * self.step
        return values.flatten(-2)[..., : self.width] if self.grouped else values


def quantize_dynamic(x: Tensor, spec: QuantSpec) -> Codes:
    """`x` [..., I] on the dynamic grid of `spec`, as the kernel does it. Raises ValueError for other grids."""
    match spec.granularity, spec.symmetric:
        case Granularity.PER_TOKEN, False:
            return quantize_tokens(x, spec)
        case Granularity.PER_TOKEN, True:
            return quantize_symmetric(x, spec)
        case Granularity.PER_GROUP, True:
            return quantize_groups(x, spec)
    raise ValueError(f"no dynamic activation grid {spec}, symmetric {spec.symmetric}")


def quantize_symmetric(x: Tensor, spec: QuantSpec) -> Codes:
    """One symmetric grid per token: `step = largest |x| / 127`, `code = x / step` rounded half to even."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(LEAST_LARGEST) / spec.qmax
    return Codes((x / step).round(), torch.zeros_like(step), step, x.shape[-1])


def quantize_groups(x: Tensor, spec: QuantSpec) -> Codes:
    """One symmetric grid per token and group: codes [..., G, g], step [..., G, 1]; a short last group is padded with 0.

    `code = x * (127 / largest |x|)`, which rounds twice, as the kernel does; a group of zeros, or so small that the
    quotient is not finite, has codes 0.
    """
    width = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -width % spec.group)).unflatten(-1, (-1, spec.group))
    largest = groups.abs().amax(-1, keepdim=True)
    # `full / tensor`, not `number / tensor`: torch computes the latter as reciprocal * number, which rounds twice.
    scale = torch.full_like(largest, spec.qmax) / largest
    scale = torch.where(scale.isfinite(), scale, 0.0)
    return Codes((groups * scale).round(), torch.zeros_like(scale), largest / spec.qmax, width, grouped=True)


def unrounded(x: Tensor, spec: QuantSpec) -> Tensor:
    """What `quantize_dynamic` rounds, zero points included: float32, one row per token."""
    if not spec.symmetric:
        scale, zero_point = token_grids(x, spec)
        return torch.cat((x * scale, zero_point), dim=-1)
    codes = quantize_dynamic(x, spec)
    steps = codes.step.expand_as(codes.codes).flatten(-2) if codes.grouped else codes.step
    return torch.where(steps == 0, 0.0, torch.nn.functional.pad(x, (0, -x.shape[-1] % max(spec.group, 1))) / steps)


def token_grids(x: Tensor, spec: QuantSpec = INT8) -> tuple[Tensor, Tensor]:
    """XNNPACK's grid of each token: `scale` (codes per unit) and the zero point before rounding, [..., 1].

    The range always contains 0; the zero point is nudged from the end of the range that has the larger error.
    A token whose range is below 255 / 3.4e38 has no finite scale in float32, here as in the kernel.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    # Not `255 / range`: torch computes number / tensor as reciprocal * number, which rounds twice.
    scale = torch.where(low == high, 1.0, torch.full_like(low, spec.qmax - spec.qmin) / (high - low))
    from_low, from_high = low * scale, high * scale
    low_error, high_error = spec.qmin + from_low, spec.qmax + from_high
    zero_point = torch.where(low_error + high_error > 0, spec.qmin - from_low, spec.qmax - from_high)
    return scale, zero_point.clamp(spec.qmin, spec.qmax)


def quantize_tokens(x: Tensor, spec: QuantSpec = INT8) -> Codes:
    """One asymmetric grid per token row of `x` [..., I]."""
    scale, zero_point = token_grids(x, spec)
    zero_point = zero_point.round()
    codes = (x * scale).round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)
    return Codes(codes, zero_point, scale.reciprocal(), x.shape[-1])


def scaled_static(x: Tensor, grid: StaticRange) -> Tensor:
    """`x` in steps of a stored grid, before rounding: times the float32 reciprocal of the scale, as the kernel does."""
    return x * torch.tensor(grid.scale, dtype=torch.float32).reciprocal()


def quantize_static(x: Tensor, grid: StaticRange) -> Tensor:
    """Codes of `x` on a stored grid, as whole float32: rounded to even at ties, saturated."""
    return scaled_static(x, grid).round().add(grid.zero_point).clamp(grid.qmin, grid.qmax)


def dequantize_static(codes: Tensor, grid: StaticRange) -> Tensor:
    """Float32 of codes on a stored grid."""
    return (codes - grid.zero_point) * torch.tensor(grid.scale, dtype=torch.float32)


def fake_quantize_dynamic(x: Tensor, spec: QuantSpec) -> Tensor:
    """x on its own dynamic grid; the gradient is the identity, since a dynamic range clips nothing."""
    return _StraightThrough.apply(x, lambda v: quantize_dynamic(v, spec).dequantized())


def fake_quantize_static(x: Tensor, grid: StaticRange) -> Tensor:
    """x on a fixed grid; gradients pass inside the range only."""
    low, high = (grid.qmin - grid.zero_point) * grid.scale, (grid.qmax - grid.zero_point) * grid.scale
    clamped = x.clamp(low, high) if x.requires_grad else x
    return _StraightThrough.apply(clamped, lambda v: dequantize_static(quantize_static(v, grid), grid))


def range_grid(low: float, high: float, bits: int = 8) -> StaticRange:
    """The grid of `bits` bits that covers [low, high] and has a code for zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    step = (high - low) / (qmax - qmin) or 1.0
    scale = float(torch.tensor(step, dtype=torch.float32).clamp_min(2.0**-100))
    return StaticRange(scale, max(qmin, min(qmax, round(qmin - low / scale))), bits)


def straight_through(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(x)`, whose gradient is taken for that of the identity."""
    return _StraightThrough.apply(x, function)


class _StraightThrough(torch.autograd.Function):
    """Any elementwise rounding; the gradient passes unchanged and nothing is saved."""

    @staticmethod
    def forward(ctx, x: Tensor, function) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None
