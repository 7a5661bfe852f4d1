"""Uniform grids: scales from ranges, codes from scales, and the same in a form that gradients pass.

Symmetric weights, G groups of g input features: `scale = clip * max|w| / qmax`, `code = clamp(round(w / scale))`,
rounding half to even, scales rounded to what the kernel stores *before* codes are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afq_export.spec.quant import Granularity, QuantSpec, ScaleType

SMALLEST_SCALE = {
    ScaleType.FLOAT32: 2.0**-100,
    ScaleType.BFLOAT16: 2.0**-100,
    ScaleType.FLOAT16: 2.0**-14,
    ScaleType.STEPS: 2.0**-90,
}
"""A group of zeros or denormals gets this scale: its codes are 0, and neither the scale nor its inverse overflows. In
float16 it is the smallest normal number: accelerators flush less than that to 0."""
STORED = {ScaleType.BFLOAT16: torch.bfloat16, ScaleType.FLOAT16: torch.float16}
"""What kernels keep scales in, other than float32."""
LARGEST_STEP = 16
"""Of a row's groups, in units of that row: QNN's block scales have 4 bits, for 1 to 16."""


def weight_scales(weight_OI: Tensor, clip_OG: Tensor, spec: QuantSpec) -> Tensor:
    """Scales [O, G] for ranges of `clip` times each group's largest absolute value. Differentiable in both."""
    return clipped_scales(group_peaks(weight_OI, spec), clip_OG, spec)


def group_peaks(weight_OI: Tensor, spec: QuantSpec) -> Tensor:
    """Each group's largest absolute value [O, G]."""
    return _Peaks.apply(grouped(weight_OI, spec))


def clipped_scales(peaks_OG: Tensor, clip_OG: Tensor, spec: QuantSpec) -> Tensor:
    """`weight_scales` of a weight that is known by its groups' largest values."""
    scales = clip_OG * peaks_OG / spec.qmax
    if spec.granularity is Granularity.PER_TENSOR:
        scales = scales.amax(0, keepdim=True).expand_as(scales)
    return round_scales(scales.clamp_min(SMALLEST_SCALE[spec.scale_type]), spec.scale_type)


def weight_codes(weight_OI: Tensor, scales_OG: Tensor, spec: QuantSpec) -> Tensor:
    """Codes int8 [O, I]: `round(w / scale)` half to even, clamped to the grid."""
    return in_steps(weight_OI, scales_OG, spec).round_().clamp_(spec.qmin, spec.qmax).to(torch.int8)


def in_steps(weight_OI: Tensor, scales_OG: Tensor, spec: QuantSpec) -> Tensor:
    """`w / scale` [O, I], not rounded."""
    return _ungrouped(grouped(weight_OI, spec) / scales_OG[..., None], weight_OI.shape[1])


def fake_quantize_weight(weight_OI: Tensor, scales_OG: Tensor, spec: QuantSpec) -> Tensor:
    """`scale * code` with straight-through gradients for weight and scales."""
    values = _FakeQuantize.apply(grouped(weight_OI, spec), scales_OG[..., None], spec.qmin, spec.qmax)
    return _ungrouped(values, weight_OI.shape[1])


def round_with_offsets(weight_OI: Tensor, scales_OG: Tensor, offsets_OGg: Tensor, spec: QuantSpec) -> Tensor:
    """`scale * clamp(round(w / scale + offset))` [O, I] with straight-through gradients for scale and offset."""
    values = _RoundWithOffsets.apply(grouped(weight_OI, spec), scales_OG[..., None], offsets_OGg, spec.qmin, spec.qmax)
    return _ungrouped(values, weight_OI.shape[1])


def rounded_codes(weight_OI: Tensor, scales_OG: Tensor, offsets_OGg: Tensor, spec: QuantSpec) -> Tensor:
    """The codes int8 [O, I] of `round_with_offsets`."""
    codes = (grouped(weight_OI, spec) / scales_OG[..., None] + offsets_OGg).round().clamp(spec.qmin, spec.qmax)
    return _ungrouped(codes, weight_OI.shape[1]).to(torch.int8)


def scale_codes(codes_OI: Tensor, scales_OG: Tensor, spec: QuantSpec, offsets_OI: Tensor | None = None) -> Tensor:
    """`scale * code` [O, I] of codes int8 [O, I], differentiable in the scales; keeps no float copy of codes. With
    offsets, in steps, the codes are `moved_codes`; they get a straight-through gradient, clamped or not."""
    if offsets_OI is not None:
        codes_OI = moved_codes(codes_OI, offsets_OI, spec)
        offsets_OI = grouped(offsets_OI, spec)
    values = _ScaleCodes.apply(grouped(codes_OI, spec), scales_OG[..., None], offsets_OI)
    return _ungrouped(values, codes_OI.shape[1])


@torch.no_grad()
def moved_codes(codes_OI: Tensor, offsets_OI: Tensor, spec: QuantSpec) -> Tensor:
    """`clamp(code + round(offset))` int8 [O, I], half to even."""
    return offsets_OI.round().add_(codes_OI).clamp_(spec.qmin, spec.qmax).to(torch.int8)


def grouped(weight_OI: Tensor, spec: QuantSpec) -> Tensor:
    """The weight as [O, G, g]; a ragged last group is padded with zeros, which never widen a range."""
    if spec.granularity is not Granularity.PER_GROUP:
        return weight_OI[:, None, :]
    missing = -weight_OI.shape[1] % spec.group
    if missing:
        weight_OI = torch.nn.functional.pad(weight_OI, (0, missing))
    return weight_OI.view(weight_OI.shape[0], -1, spec.group)


def _ungrouped(values_OGg: Tensor, inputs: int) -> Tensor:
    """[O, I] of what `grouped` made, without its padding."""
    return values_OGg.reshape(len(values_OGg), -1)[:, :inputs]


def round_scales(scales: Tensor, scale_type: ScaleType) -> Tensor:
    """Scales as the kernel keeps them (halves: round to nearest even), gradient passed straight through."""
    if scale_type is ScaleType.STEPS:
        steps, unit = block_steps(scales.detach())
        return steps.float() * unit + (scales - scales.detach())
    if scale_type not in STORED:
        return scales
    return scales + (scales.detach().to(STORED[scale_type]).to(scales.dtype) - scales.detach())


def block_steps(scales_OG: Tensor) -> tuple[Tensor, Tensor]:
    """Scales as whole multiples of one number per row: steps uint8 [O, G] of 1 to LARGEST_STEP, units float32 [O, 1].

    Units have 16 significant bits, so that steps * unit is exact and the same comes out of what it gives.
    """
    bits = (scales_OG.amax(-1, keepdim=True) / LARGEST_STEP).contiguous().view(torch.int32)
    unit = ((bits + 0x80) & ~0xFF).view(torch.float32)
    return (scales_OG / unit).round().clamp(1, LARGEST_STEP).to(torch.uint8), unit


class _Peaks(torch.autograd.Function):
    """Largest absolute value of every group; the gradient goes to it, in equal parts where several are as large."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        peaks = values.abs().amax(-1, keepdim=True)
        ctx.save_for_backward(values, peaks)
        return peaks[..., 0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        values, peaks = ctx.saved_tensors
        largest = _zero_as_one((peaks - values.abs()).sign_())
        share = grad[..., None] / largest.sum(-1, keepdim=True)
        return largest.mul_(share).mul_(values.sign())


class _FakeQuantize(torch.autograd.Function):
    """round and clamp with the straight-through estimator, fused, no graph of small operations.

    d out / d w = 1 inside the range, 0 outside; d out / d scale = code - w / scale inside, code outside (LSQ,
    arXiv 1902.08153, eq. 3).
    """

    @staticmethod
    def forward(ctx, values: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        ratio = values / scale
        codes = ratio.round().clamp_(qmin, qmax)
        inside = _zero_as_one(ratio.clamp(qmin - 0.5, qmax + 0.5).sub_(ratio).sign_())
        ctx.save_for_backward(codes - ratio.mul_(inside), inside)
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        slope, inside = ctx.saved_tensors
        return grad * inside, (grad * slope).sum(-1, keepdim=True), None, None


def _zero_as_one(signs: Tensor) -> Tensor:
    """1 where `signs` of -1, 0 and 1 are 0, else 0, in place: a mask of floats, whose products are eight times as fast
    as those with booleans."""
    return signs.abs_().neg_().add_(1)


class _RoundWithOffsets(torch.autograd.Function):
    """As `_FakeQuantize`, for the scale and the offset in front of the rounding; the weight is given."""

    @staticmethod
    def forward(ctx, values: Tensor, scale: Tensor, offsets: Tensor, qmin: int, qmax: int) -> Tensor:
        ratio = values / scale
        moved = ratio + offsets
        codes = moved.round().clamp_(qmin, qmax)
        inside = (moved >= qmin - 0.5) & (moved <= qmax + 0.5)
        ctx.save_for_backward(codes - ratio * inside, inside, scale)
        return codes * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        slope, inside, scale = ctx.saved_tensors
        return None, (grad * slope).sum(-1, keepdim=True), grad * inside * scale, None, None


class _ScaleCodes(torch.autograd.Function):
    """scale * code; d out / d scale = code, d out / d offset = scale, as if codes were not rounded."""

    @staticmethod
    def forward(ctx, codes: Tensor, scale: Tensor, offsets: Tensor | None):
        ctx.save_for_backward(codes, scale)
        return codes * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        codes, scale = ctx.saved_tensors
        return None, (grad * codes).sum(-1, keepdim=True), grad * scale if ctx.needs_input_grad[2] else None
