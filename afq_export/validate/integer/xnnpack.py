"""The arithmetic of XNNPACK's four int8-activation linear kernels, exactly.

    kernel          arithmetic            accumulator             output
    qd8-f32-qc8w    dynamic_per_channel   int32                   float32: fma(float(acc) * step, scale, bias)
    qd8-f32-qc4w    dynamic_per_channel   int32                   the same
    qd8-f32-qb4w    dynamic_per_group     int32 a group, float32  float32: one fma a group, then * step, + bias
    qs8-qc8w        static_per_channel    int32, bias included    int8: round(float(acc) * scale) + zero point

Sources: XNNPACK `src/qs8-gemm/MRx16c8-avx512vnni.c.in`, `xnn_f32_qd8_asymmetric_quantization_params` and ExecuTorch's
`backends/xnnpack/operators/quant_params.py` (bias); each model is compared with the real runtime by
tests/validate/test_xnnpack_runtime.py.

The per-channel kernels round in one chain that all instruction sets share. The order in which `dynamic_per_group`
adds its groups in float32 is that of x86 with AVX512-VNNI; the integers and scales are the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afq_export.errors import InputError
from afq_export.quantize.activations import dequantize_static, quantize_static, quantize_tokens
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.validate.integer.dot import QMAX, QMIN, check_range, dot, input_grid, output_grid
from afq_export.validate.integer.float32 import fma

GROUP_TOKENS = 64
"""Tokens that the per-group model takes at a time, so that the running sums stay in the cache."""


def dynamic_per_channel(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """qd8-f32-qc8w and qd8-f32-qc4w: float32 [T, O]."""
    tokens = quantize_tokens(x_TI)
    sums_TO = dot(tokens.codes - tokens.zero_point, linear.codes)
    scaled_TO = sums_TO.float() * tokens.step
    return fma(scaled_TO, linear.scales[:, 0], _bias(linear))


def dynamic_per_group(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """qd8-f32-qb4w: float32 [T, O]. Raises InputError when a scale is no bfloat16 number (the kernel would cut it)."""
    if not torch.equal(linear.scales, linear.scales.bfloat16().float()):
        raise InputError("group scales are not bfloat16", where=linear.spec.name, why="the kernel would round them")
    tokens, group = quantize_tokens(x_TI), linear.spec.weight.group
    codes_GOi = _grouped(linear.codes, group)
    scales_GO = linear.scales.t().contiguous()
    weight_sum_O = torch.zeros_like(scales_GO[0])
    for sum_O, scale_O in zip(codes_GOi.sum(-1), scales_GO, strict=True):
        weight_sum_O = weight_sum_O + sum_O.float() * scale_O
    totals_TO = (QMIN - tokens.zero_point) * weight_sum_O
    _add_groups(totals_TO, _grouped(tokens.codes - QMIN, group), codes_GOi, scales_GO)
    return totals_TO * tokens.step + _bias(linear)


def static_per_channel(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """qs8-qc8w between its float borders: quantize, multiply, requantize, dequantize. Float32 [T, O]."""
    source, target = input_grid(linear), output_grid(linear)
    codes_TO = static_codes(linear, quantize_static(x_TI, source))
    return dequantize_static(codes_TO, target)


def static_codes(linear: QuantizedLinear, codes_TI: Tensor) -> Tensor:
    """qs8-qc8w itself: int8 codes in, int8 codes out [T, O], both as whole float32."""
    source, target = input_grid(linear), output_grid(linear)
    input_scale, output_scale = torch.tensor([source.scale, target.scale], dtype=torch.float32)
    scales_O = linear.scales[:, 0]
    sums_TO = dot(codes_TI - source.zero_point, linear.codes)
    if linear.bias is not None:
        # Lowering stores the bias as int32 in units of one product; it multiplies by the reciprocal.
        sums_TO = check_range(sums_TO + (linear.bias * (1.0 / (scales_O * input_scale))).round())
    requantization_O = input_scale * scales_O / output_scale
    return ((sums_TO.float() * requantization_O).round() + target.zero_point).clamp(QMIN, QMAX)


def _add_groups(totals_TO: Tensor, x_GTi: Tensor, codes_GOi: Tensor, scales_GO: Tensor) -> None:
    """Adds `scale_g * (x_g . codes_g)` to the float32 `totals`, in place: groups in order, rounded once each (an fma).

    With `_exact_dtype` the products of a group need no rounding, so scales go into the weights and one addition is
    the fma; else every step is emulated.
    """
    dtype = _exact_dtype(codes_GOi, scales_GO)
    if dtype is None:
        for x_Ti, codes_Oi, scale_O in zip(x_GTi.double(), codes_GOi.double(), scales_GO, strict=True):
            totals_TO.copy_(fma((x_Ti @ codes_Oi.t()).float(), scale_O, totals_TO))
        return
    x_GTi, weights_GOi = x_GTi.to(dtype), codes_GOi.to(dtype) * scales_GO[..., None].to(dtype)
    for start in range(0, len(totals_TO), GROUP_TOKENS):
        part = slice(start, start + GROUP_TOKENS)
        running = totals_TO[part]
        for x_Ti, weights_Oi in zip(x_GTi[:, part], weights_GOi, strict=True):
            running = (running + x_Ti @ weights_Oi.t()).float()
        totals_TO[part] = running


def _exact_dtype(codes_GOi: Tensor, scales_GO: Tensor) -> torch.dtype | None:
    """The dtype in which `totals + x_g . (scale_g * codes_g)` has one rounding, to float32; None: neither has.

    All terms of a group are whole multiples of the last bit of its scale, an 8-bit significand: at most
    `group * 255 * max|code| * 255` of them. Below 2^24 float32 holds every partial sum, in whatever order the matmul
    adds, and the addition to the total rounds once. Float64 holds the *sum* with the total as well, when all scales of
    the row are so near each other that total and group are multiples of one unit, below 2^53 of them: then only the
    cast to float32 rounds.
    """
    groups, _, group = codes_GOi.shape
    largest = group * (QMAX - QMIN) * int(codes_GOi.abs().max())
    if largest * 255 < 2**24 and torch.get_float32_matmul_precision() == "highest":
        return torch.float32
    smallest_O = torch.where(scales_GO > 0, scales_GO, torch.inf).amin(0)
    ratio = float((scales_GO.amax(0) / smallest_O).max())
    # The total starts at up to the groups' own magnitude: twice, and twice again for what was rounded on the way.
    return torch.float64 if 4 * groups * largest * 256 * ratio < 2**53 else None


def _grouped(rows: Tensor, group: int) -> Tensor:
    """[R, I] as [G, R, group]."""
    return rows.view(rows.shape[0], -1, group).transpose(0, 1).contiguous()


def _bias(linear: QuantizedLinear) -> Tensor:
    return torch.zeros(linear.codes.shape[0]) if linear.bias is None else linear.bias
