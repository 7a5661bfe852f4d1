"""The arithmetic of OpenVINO's CPU plugin for compressed linears: a matrix product that decompresses its weights.

    function            DYNAMIC_QUANTIZATION_GROUP_SIZE    the output is
    dynamic_per_group   32                                 sum over groups of fma(fl(dot_g * step_g), ws_g, sum), + b
    weight_only         0                                  x . (ws * code) + b

dot_g is int32, fl() rounds to float32. With groups the order of additions is known (`blocks_of` says where a sum starts
anew), and the model is the kernel bit for bit on a CPU with AVX-512 VNNI; integers and scales are the same elsewhere.

The file says weight_only; the property makes the plugin quantize the input of each linear to int8 as well, in groups of
32 whatever the weights' groups are. Source: measured on OpenVINO 2026.4.1, and compared with it by
tests/validate/test_openvino_runtime.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afq_export.errors import InputError
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.validate.integer.dot import QMAX, check_range
from afq_export.validate.integer.float32 import fma

BLOCK = 16
"""Inputs of a block of the matrix product."""
MOST, LEAST, WHOLE = 64, 16, 16
"""Blocks that are summed in one go at most and at least, and groups of them where blocks do not end with a group."""


def dynamic_per_group(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """One symmetric grid per token and group of inputs: float32 [T, O]."""
    spec, weight = linear.spec, linear.spec.weight
    if spec.activation is None or not spec.activation.group:
        raise InputError("no dynamic activation groups", where=spec.name, do="use a recipe with dynamic activations")
    group = spec.activation.group
    x_TGg, step_TG1 = quantize_by_step(x_TI, group)
    codes_OGg = grouped(linear.codes, group).double()
    groups = codes_OGg.shape[1]
    scales_OG = linear.scales
    if weight.group:
        scales_OG = scales_OG.repeat_interleave(weight.group // group, dim=1)
    run = blocks_of(spec.inputs, math.lcm(group, weight.group or group)) // group
    total_TO: Tensor | None = None
    for start in range(0, groups, run):
        sum_TO = torch.zeros(len(x_TI), spec.outputs)
        for g in range(start, min(start + run, groups)):
            dot_TO = check_range(x_TGg[:, g].double() @ codes_OGg[:, g].t())
            scale_O = scales_OG[:, g if weight.group else 0]
            sum_TO = fma(dot_TO.float() * step_TG1[:, g], scale_O, sum_TO)
        total_TO = sum_TO if total_TO is None else total_TO + sum_TO
    assert total_TO is not None
    return total_TO if linear.bias is None else total_TO + linear.bias


def quantize_by_step(x_TI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes [T, G, g], whole float32, and steps [T, G, 1]: `step = largest |x| / 127`, `code = x * (1 / step)`.

    Codes are rounded half to even, but in a short last group, which the kernel leaves to scalar code, half away from
    zero. A group of zeros has codes 0.
    """
    x_TGg = grouped(x_TI, group)
    step_TG1 = x_TGg.abs().amax(-1, keepdim=True) / QMAX
    inverse_TG1 = step_TG1.reciprocal()
    ratio_TGg = x_TGg * torch.where(inverse_TG1.isfinite(), inverse_TG1, 0.0)
    codes_TGg = ratio_TGg.round()
    if x_TI.shape[-1] % group:
        last_Tg = ratio_TGg[:, -1]
        halves = (last_Tg - last_Tg.trunc()).abs() == 0.5
        codes_TGg[:, -1] = torch.where(halves, last_Tg.trunc() + last_Tg.sign(), codes_TGg[:, -1])
    return codes_TGg, step_TG1


def grouped(rows: Tensor, group: int) -> Tensor:
    """[R, I] as [R, G, group], the last one filled up with zeros."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % group)).unflatten(-1, (-1, group))


def blocks_of(inputs: int, group: int) -> int:
    """Inputs after which the kernel starts a new sum, which it adds to the one before.

    The most blocks that divide all of them, unless they are too few; whole groups of weights in any case.
    """
    blocks = -(-inputs // BLOCK)
    run = max(count for count in range(1, MOST + 1) if blocks % count == 0)
    size = BLOCK * (run if run >= LEAST else MOST)
    return WHOLE * group if size % group else size
