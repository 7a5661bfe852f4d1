"""Grids against a slow, obvious oracle, and the gradients of the fused fake quantization against autograd's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.quantize.activations import (
    INT8,
    fake_quantize_dynamic,
    quantize_static,
    quantize_tokens,
    range_grid,
)
from afq_export.quantize.checkpoint import dequantize
from afq_export.quantize.grid import fake_quantize_weight, weight_codes, weight_scales
from afq_export.spec.quant import Granularity, QuantSpec, ScaleType


def spec_of(bits: int, group: int, bf16: bool = False) -> QuantSpec:
    granularity = Granularity.PER_GROUP if group else Granularity.PER_CHANNEL
    return QuantSpec(bits, granularity, group=group, scale_type=ScaleType.BFLOAT16 if bf16 else ScaleType.FLOAT32)


def oracle_codes(weight: np.ndarray, scales: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """One weight at a time, Python's half-to-even round."""
    codes = np.zeros(weight.shape, np.int64)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            scale = scales[o, i // spec.group if spec.group else 0]
            codes[o, i] = min(spec.qmax, max(spec.qmin, round(float(np.float32(weight[o, i]) / np.float32(scale)))))
    return codes


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([0, 4, 8, 32]),
    outputs=st.integers(1, 4),
    inputs=st.integers(1, 70),
    bf16=st.booleans(),
    seed=st.integers(0, 99),
)
def test_codes_equal_the_oracle(bits: int, group: int, outputs: int, inputs: int, bf16: bool, seed: int) -> None:
    spec = spec_of(bits, group, bf16)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    scales = weight_scales(weight, torch.ones(outputs, spec.groups(inputs)), spec)
    assert scales.shape == (outputs, spec.groups(inputs))
    codes = weight_codes(weight, scales, spec)
    assert np.array_equal(codes.numpy(), oracle_codes(weight.numpy(), scales.numpy(), spec))
    if bf16:
        assert torch.equal(scales, scales.bfloat16().float())


def test_zero_rows_and_denormals_give_finite_scales_and_zero_codes() -> None:
    weight = torch.zeros(3, 8)
    weight[1] = 1e-42
    weight[2, 0] = 1.0
    scales = weight_scales(weight, torch.ones(3, 1), spec_of(4, 0))
    assert bool(torch.isfinite(1 / scales).all())
    assert weight_codes(weight, scales, spec_of(4, 0))[:2].abs().max() == 0


def test_half_scales_are_halves_and_never_flushed() -> None:
    """float16 where a kernel keeps that: rounded before the codes, and no scale below its least normal number."""
    spec = QuantSpec(8, Granularity.PER_GROUP, group=4, scale_type=ScaleType.FLOAT16)
    weight = (
        torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1e-2, 1e-5, 0, 9])[:, None]
    )
    scales = weight_scales(weight, torch.ones(5, 2), spec)
    assert torch.equal(scales, scales.half().float())
    assert float(scales.min()) == 2.0**-14
    assert np.array_equal(weight_codes(weight, scales, spec), oracle_codes(weight.numpy(), scales.numpy(), spec))


def test_one_scale_for_a_whole_tensor() -> None:
    """The widest row's, for every row."""
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[:, None]
    rows = weight_scales(weight, torch.ones(5, 1), spec_of(8, 0))
    scales = weight_scales(weight, torch.ones(5, 1), QuantSpec(8, Granularity.PER_TENSOR))
    assert torch.equal(scales, rows.max().expand(5, 1))
    assert int(weight_codes(weight, scales, spec_of(8, 0)).abs().max()) == 127


@pytest.mark.parametrize("group", [0, 4])
def test_fused_gradients_are_the_straight_through_estimators(group: int) -> None:
    spec = spec_of(3, group)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 10, generator=generator, requires_grad=True)
    clip = torch.full((5, spec.groups(10)), 0.6, requires_grad=True)
    upstream = torch.randn(5, 10, generator=generator)

    def plain(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        wide = scale.repeat_interleave(group, 1)[:, :10] if group else scale
        ratio = w / wide
        rounded = ratio + (ratio.round() - ratio).detach()
        return rounded.clamp(spec.qmin, spec.qmax) * wide

    grads = []
    for function in (lambda w, s: fake_quantize_weight(w, s, spec), plain):
        weight.grad = clip.grad = None
        (function(weight, weight_scales(weight, clip, spec)) * upstream).sum().backward()
        grads.append((weight.grad.clone(), clip.grad.clone()))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-5)


def test_fake_quantized_weight_is_what_the_codes_say() -> None:
    spec = spec_of(4, 8, bf16=True)
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    scales = weight_scales(weight, torch.full((6, 3), 0.8), spec)
    codes = weight_codes(weight, scales, spec)
    assert torch.equal(fake_quantize_weight(weight, scales, spec), dequantize(codes, scales, 8))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1.0, 1e6]), offset=st.sampled_from([0.0, 3.0, -3.0]))
def test_dynamic_codes_cover_the_row_within_a_step(seed: int, scale: float, offset: float) -> None:
    x = (torch.randn(4, 33, generator=torch.Generator().manual_seed(seed)) + offset) * scale
    tokens = quantize_tokens(x)
    assert tokens.codes.min() >= -128 and tokens.codes.max() <= 127
    assert torch.equal(tokens.codes, tokens.codes.round())
    assert bool(((tokens.dequantized() - x).abs() <= 1.01 * tokens.step).all())


def test_dynamic_gradient_is_the_identity() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    fake_quantize_dynamic(x, INT8).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_static_grid_has_a_code_for_zero_and_saturates() -> None:
    grid = range_grid(0.5, 4.0)
    assert grid.zero_point == -128
    codes = quantize_static(torch.tensor([0.0, 4.0, 9.0, -1.0]), grid)
    assert codes.tolist() == [-128, 127, 127, -128]
    assert range_grid(0.0, 0.0).scale > 0
