"""The fast integer models against a slow, obvious one: Python integers, numpy float32, exact rational fma."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.errors import InputError
from afq_export.quantize.activations import quantize_tokens
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.validate.integer import xnnpack
from afq_export.validate.integer.float32 import fma
from afq_export.validate.integer.linear import integer_linear
from tests.checkpoints import KERNELS, random_linear, xnnpack_target
from tests.validate.onnx_programs import linear_of

F32 = np.float32
F32_MAX = np.finfo(F32).max
ARITHMETIC = {kernel.name: kernel.arithmetic for kernel in xnnpack_target().kernels}
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def exact_fma(a: float, b: float, c: float) -> np.float32:
    """`a * b + c` as a fraction, rounded once to the nearest float32, ties to even."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if abs(exact) >= Fraction(2**128 - 2**103):
        return F32(math.copysign(math.inf, exact))
    near = F32(float(exact) if abs(exact) < 2**128 - 2**104 else float(F32_MAX) * (1 if exact > 0 else -1))
    neighbours = (near, np.nextafter(near, F32_MAX), np.nextafter(near, -F32_MAX))
    return min(neighbours, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.int32)) & 1))


def fma_of(a: float, b: float, c: float) -> np.float32:
    return fma(*(torch.tensor([value], dtype=torch.float32) for value in (a, b, c))).numpy()[0]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(FLOATS, FLOATS, FLOATS)
def test_fma_rounds_once(a, b, c):
    assert fma_of(a, b, c) == exact_fma(a, b, c)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(-120, 60), st.integers(0, 2**23 - 1), st.sampled_from([-1, 1]), st.sampled_from([-1, 1]))
def test_fma_rounds_once_next_to_a_midpoint(exponent, mantissa, sign, side):
    """The product is half a unit of `c` and a bit more or less; float64 cannot hold the bit."""
    c = sign * (1 + mantissa * 2.0**-23)
    half = 2.0**-24 * (1 + 2.0**-23)
    a, c = (float(np.ldexp(F32(value), exponent)) for value in (half, c))
    b = 1 + 2.0**-23 if side > 0 else 1 - 2.0**-23
    assert fma_of(a, b, c) == exact_fma(a, b, c)


def test_float64_alone_would_round_twice():
    """(1 + 2^-23) + 2^-24 (1 - 2^-46) is below a midpoint; its float64 sum is the midpoint."""
    a, b, c = 2.0**-24 * (1 + 2.0**-23), 1 - 2.0**-23, 1 + 2.0**-23
    assert F32(np.float64(a) * b + c) == F32(1 + 2.0**-22)
    assert fma_of(a, b, c) == exact_fma(a, b, c) == F32(1 + 2.0**-23)


def slow_tokens(row: np.ndarray) -> tuple[list[int], int, np.float32]:
    """XNNPACK's dynamic quantization of one token, operation by operation."""
    low, high = min(F32(0), row.min()), max(F32(0), row.max())
    scale = F32(1) if low == high else F32(255) / (high - low)
    low_scaled, high_scaled = low * scale, high * scale
    from_low = (F32(-128) + low_scaled) + (F32(127) + high_scaled) > 0
    zero = F32(-128) - low_scaled if from_low else F32(127) - high_scaled
    zero_point = int(np.rint(min(max(zero, F32(-128)), F32(127))))
    codes = [min(max(int(np.rint(x * scale)) + zero_point, -128), 127) for x in row]
    return codes, zero_point, F32(1) / scale


def slow_dynamic(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """qc8w, qc4w and qb4w with Python integers."""
    group, codes, scales = linear.spec.weight.group, linear.codes.tolist(), linear.scales.numpy()
    out = np.zeros((len(x), len(codes)), F32)
    for t, row in enumerate(x):
        xq, zero, step = slow_tokens(row)
        for o, weights in enumerate(codes):
            bias = F32(0) if linear.bias is None else F32(linear.bias[o])
            if not group:
                total = sum((a - zero) * w for a, w in zip(xq, weights, strict=True))
                out[t, o] = exact_fma(float(F32(total) * step), float(scales[o, 0]), float(bias))
                continue
            parts = [slice(start, start + group) for start in range(0, len(xq), group)]
            weight_sum = F32(0)
            for part, scale in zip(parts, scales[o], strict=True):
                weight_sum = weight_sum + F32(sum(weights[part])) * scale
            total = F32(-(zero + 128)) * weight_sum
            for part, scale in zip(parts, scales[o], strict=True):
                dot = sum((a + 128) * w for a, w in zip(xq[part], weights[part], strict=True))
                total = exact_fma(float(dot), float(scale), float(total))
            out[t, o] = total * step + bias
    return out


def slow_static(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """qs8 with Python integers."""
    source, target = linear.record.input, linear.record.output
    xs, ys = F32(source.scale), F32(target.scale)
    out = np.zeros((len(x), len(linear.codes)), F32)
    for t, row in enumerate(x):
        xq = [min(max(int(np.rint(v * (F32(1) / xs))) + source.zero_point, -128), 127) for v in row]
        for o, weights in enumerate(linear.codes.tolist()):
            scale = F32(linear.scales[o, 0])
            total = sum((a - source.zero_point) * w for a, w in zip(xq, weights, strict=True))
            if linear.bias is not None:
                total += int(np.rint(F32(linear.bias[o]) * (F32(1) / (scale * xs))))
            code = int(np.rint(F32(total) * (xs * scale / ys))) + target.zero_point
            out[t, o] = F32(min(max(code, -128), 127) - target.zero_point) * ys
    return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_model_is_the_slow_model(kernel, bias):
    linear = random_linear(kernel, 9, 96, bias=bias, seed=3)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    x[0], x[1], x[2] = 0, x[1].abs(), -x[2].abs() - 3
    x[3, 5] = 300
    slow = slow_static if kernel == "qs8-qc8w" else slow_dynamic
    ours = integer_linear(ARITHMETIC[kernel], linear, x)
    assert ours.dtype is torch.float32
    assert (ours.numpy() == slow(linear, x.numpy())).all()


def slow_dot(codes: list[int], weights: list[int]) -> int:
    return sum(a * w for a, w in zip(codes, weights, strict=True))


def slow_static_onnx(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """QuantizeLinear, then MatMulIntegerToFloat or QLinearMatMul, with Python integers."""
    source, target = linear.record.input, linear.record.output
    xs, out = F32(source.scale), np.zeros((len(x), len(linear.codes)), F32)
    for t, row in enumerate(x):
        codes = [min(max(int(np.rint(v / xs)) + source.zero_point, -128), 127) - source.zero_point for v in row]
        for o, weights in enumerate(linear.codes.tolist()):
            total, unit = F32(slow_dot(codes, weights)), xs * F32(linear.scales[o, 0])
            if target is None:
                out[t, o] = total * unit if linear.bias is None else total * unit + F32(linear.bias[o])
                continue
            code = int(np.rint(total * (unit / F32(target.scale)))) + target.zero_point
            out[t, o] = F32(min(max(code, -128), 127) - target.zero_point) * F32(target.scale)
    return out


def slow_tokens_onnx(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """One symmetric grid per token and MatMulInteger, with Python integers."""
    out = np.zeros((len(x), len(linear.codes)), F32)
    for t, row in enumerate(x):
        step = max(np.abs(row).max(), F32(2.0**-90)) / F32(127)
        codes = [int(np.rint(v / step)) for v in row]
        for o, weights in enumerate(linear.codes.tolist()):
            out[t, o] = F32(slow_dot(codes, weights)) * step * F32(linear.scales[o, 0])
            if linear.bias is not None:
                out[t, o] += F32(linear.bias[o])
    return out


def slow_blocks_onnx(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """MatMulNBits in exact fractions, rounded once: level 4 with int8 groups of the input, level 0 with the floats."""
    group, out = linear.spec.weight.group, np.zeros((len(x), len(linear.codes)), F32)
    for t, row in enumerate(x):
        for o, weights in enumerate(linear.codes.tolist()):
            total = Fraction(0 if linear.bias is None else float(linear.bias[o]))
            for g, start in enumerate(range(0, len(row), group)):
                part, scale = row[start : start + group], F32(linear.scales[o, g])
                some = weights[start : start + group]
                if linear.spec.activation is None:
                    products = zip(part, some, strict=True)
                    total += sum(Fraction(float(v)) * Fraction(float(F32(w) * scale)) for v, w in products)
                    continue
                largest = np.abs(part).max()
                codes = [int(np.rint(v * (F32(127) / largest))) if largest else 0 for v in part]
                total += slow_dot(codes, some) * Fraction(float(largest / F32(127))) * Fraction(float(scale))
            out[t, o] = F32(float(total))
    return out


SLOW_ONNX = {
    "static_to_float": slow_static_onnx,
    "static_requantized": slow_static_onnx,
    "dynamic_per_token": slow_tokens_onnx,
    "dynamic_per_block": slow_blocks_onnx,
    "weight_only": slow_blocks_onnx,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("arithmetic", SLOW_ONNX)
def test_onnxruntime_model_is_the_slow_model(arithmetic, bits, bias):
    """The last group is ragged."""
    linear = linear_of(arithmetic, 9, 77, bits=bits, bias=bias, seed=3)
    x = torch.randn(7, 77, generator=torch.Generator().manual_seed(1))
    x[0], x[1], x[2] = 0, x[1].abs(), -x[2].abs() - 3
    x[3, 5], x[4] = 300, x[4] * 1e-12
    x[5] = (x[5] * 4).round() / 8 * linear.record.input.scale if linear.record.input else x[5].round() / 2
    ours = integer_linear(f"onnxruntime.{arithmetic}", linear, x)
    assert ours.dtype is torch.float32
    assert (ours.numpy() == SLOW_ONNX[arithmetic](linear, x.numpy())).all()


def test_groups_too_small_for_a_scale_are_zero():
    """127 / largest is not finite there: no number may come of it, as none comes of it in the kernel."""
    linear = linear_of("dynamic_per_block", 8, 64, bias=False)
    x = torch.full((1, 64), 1e-38)
    assert (integer_linear("onnxruntime.dynamic_per_block", linear, x) == 0).all()


@pytest.mark.parametrize("arithmetic", ["static_to_float", "static_requantized"])
def test_a_static_model_needs_its_ranges(arithmetic):
    linear = linear_of("weight_only", bias=False)
    with pytest.raises(InputError, match="no static activation range"):
        integer_linear(f"onnxruntime.{arithmetic}", linear, torch.zeros(1, 64))


@pytest.mark.parametrize("arithmetic", ["dynamic_per_token", "dynamic_per_block"])
def test_a_dynamic_model_needs_a_grid(arithmetic):
    with pytest.raises(InputError, match="no dynamic activation grid"):
        integer_linear(f"onnxruntime.{arithmetic}", linear_of("weight_only"), torch.zeros(1, 64))


@pytest.mark.parametrize("group", [32, 64, 96])
def test_fast_group_sums_are_the_emulated_ones(group, monkeypatch):
    """Both exact dtypes against the general path, on scales that spread over five octaves."""
    linear = random_linear("qd8-f32-qb4w", 16, 192, group=group, seed=group)
    spread = 2.0 ** torch.randint(-3, 3, linear.scales.shape, generator=torch.Generator().manual_seed(2))
    linear = dataclasses.replace(linear, scales=linear.scales * spread)
    x = torch.randn(150, 192, generator=torch.Generator().manual_seed(4))
    taken = []
    choose = xnnpack._exact_dtype
    monkeypatch.setattr(xnnpack, "_exact_dtype", lambda *a: taken.append(choose(*a)) or taken[-1])
    fast = integer_linear("xnnpack.dynamic_per_group", linear, x)
    monkeypatch.setattr(xnnpack, "_exact_dtype", lambda *a: None)
    assert torch.equal(fast, integer_linear("xnnpack.dynamic_per_group", linear, x))
    assert taken == [torch.float32 if group == 32 else torch.float64]


def test_scales_too_far_apart_take_the_emulation():
    linear = random_linear("qd8-f32-qb4w", 4, 128, group=64)
    scales = torch.tensor([[2.0**-60, 1.0]]).expand(4, 2).contiguous()
    linear = dataclasses.replace(linear, scales=scales)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(4))
    grouped = xnnpack._grouped(linear.codes, 64)
    assert xnnpack._exact_dtype(grouped, scales.t()) is None
    assert (integer_linear("xnnpack.dynamic_per_group", linear, x).numpy() == slow_dynamic(linear, x.numpy())).all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40))
def test_dynamic_quantization_is_the_slow_one(values):
    row = np.array(values, F32)
    if row.max(initial=0) - row.min(initial=0) < 1e-30:
        row[:] = 0  # below about 1e-36 no scale is finite
    ours = quantize_tokens(torch.from_numpy(row)[None])
    codes, zero_point, step = slow_tokens(row)
    assert ours.codes[0].tolist() == codes
    assert int(ours.zero_point) == zero_point
    assert ours.step.numpy()[0, 0] == step


def test_scale_is_one_division():
    """torch's `255 / tensor` is reciprocal and product, two roundings: a fifth of all rows would be off."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    spans = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)).numpy()
    assert (quantize_tokens(x).step[:, 0].numpy() == F32(1) / (F32(255) / spans)).all()


def test_group_scales_must_be_bfloat16():
    linear = random_linear("qd8-f32-qb4w", 4, 64)
    linear = dataclasses.replace(linear, scales=linear.scales * (1 + 2.0**-12))
    with pytest.raises(InputError, match="bfloat16"):
        integer_linear("xnnpack.dynamic_per_group", linear, torch.randn(1, 64))


def test_unknown_arithmetic_names_the_known_ones():
    with pytest.raises(InputError, match="dynamic_per_group"):
        integer_linear("float", random_linear("qd8-f32-qc8w"), torch.zeros(1, 64))


def test_overflow_is_an_error():
    """65,536 products of the largest codes leave int32."""
    linear = random_linear("qd8-f32-qc8w", 1, 1 << 17)
    linear = dataclasses.replace(linear, codes=torch.full_like(linear.codes, -128))
    with pytest.raises(InputError, match="overflow"):
        integer_linear("xnnpack.dynamic_per_channel", linear, torch.ones(1, 1 << 17))
