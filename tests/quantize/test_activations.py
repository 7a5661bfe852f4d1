"""Activations on dynamic grids against a slow, obvious oracle: one number, one float32 operation at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afq_export.quantize.activations import (
    INT8,
    LEAST_LARGEST,
    Codes,
    fake_quantize_dynamic,
    quantize_dynamic,
    scaled_static,
    unrounded,
)
from afq_export.quantize.checkpoint import StaticRange
from afq_export.spec.quant import Granularity, QuantSpec

SYMMETRIC = QuantSpec(8, Granularity.PER_TOKEN, symmetric=True, dynamic=True)
f = np.float32


def grouped(size: int) -> QuantSpec:
    return QuantSpec(8, Granularity.PER_GROUP, symmetric=True, group=size, dynamic=True)


def oracle_symmetric(row: np.ndarray) -> tuple[list[int], np.float32]:
    """One symmetric grid: codes and step."""
    step = f(max(max(abs(value) for value in row), f(LEAST_LARGEST)) / f(127))
    return [round(float(f(value / step))) for value in row], step


def oracle_group(row: np.ndarray) -> tuple[list[int], np.float32]:
    """The grid of one group: the scale is a quotient, a code a product."""
    largest = max(abs(value) for value in row)
    scale = f(127) / largest if largest else f(0)
    if not np.isfinite(scale):
        scale = f(0)
    return [round(float(f(value * scale))) for value in row], f(largest / f(127))


def oracle_asymmetric(row: np.ndarray) -> tuple[list[int], int, np.float32]:
    """XNNPACK's grid: codes, zero point and step."""
    low, high = min(0, *row), max(0, *row)
    scale = f(255) / f(high - low) if low != high else f(1)
    from_low, from_high = f(low * scale), f(high * scale)
    takes_low = f(f(-128 + from_low) + f(127 + from_high)) > 0
    exact = f(-128 - from_low) if takes_low else f(127 - from_high)
    zero_point = round(float(min(f(127), max(f(-128), exact))))
    codes = [min(127, max(-128, round(float(f(value * scale))) + zero_point)) for value in row]
    return codes, zero_point, f(1) / scale


SHAPES = dict(
    tokens=st.integers(1, 3),
    inputs=st.integers(1, 70),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e28]),
    offset=st.sampled_from([0.0, 3.0, -3.0]),
    seed=st.integers(0, 999),
)
oracle_settings = settings(max_examples=40, deadline=None, derandomize=True)


def values(tokens: int, inputs: int, size: float, offset: float, seed: int) -> Tensor:
    """Random rows, some numbers on halves of a step."""
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed)) + offset
    x[:, ::3] = (x[:, ::3] * 16).round() / 16
    return x * size


@oracle_settings
@given(**SHAPES)
def test_a_symmetric_grid_per_token(tokens: int, inputs: int, size: float, offset: float, seed: int) -> None:
    x = values(tokens, inputs, size, offset, seed)
    found = quantize_dynamic(x, SYMMETRIC)
    for row, codes, step in zip(x.numpy(), found.codes, found.step, strict=True):
        assert (codes.int().tolist(), step.numpy()[0]) == oracle_symmetric(row)
    assert not found.zero_point.any()


@oracle_settings
@given(group=st.sampled_from([1, 4, 16, 32]), **SHAPES)
def test_a_symmetric_grid_per_group(
    group: int, tokens: int, inputs: int, size: float, offset: float, seed: int
) -> None:
    """A short last group is padded with zeros, which change neither its largest value nor any sum."""
    x = values(tokens, inputs, size, offset, seed)
    found, groups = quantize_dynamic(x, grouped(group)), -(-inputs // group)
    assert found.codes.shape == (tokens, groups, group) and found.step.shape == (tokens, groups, 1)
    for token in range(tokens):
        for index in range(groups):
            row = x[token, index * group : (index + 1) * group].numpy()
            codes, step = oracle_group(row)
            assert found.codes[token, index].int().tolist() == codes + [0] * (group - len(row))
            assert found.step[token, index].numpy()[0] == step
    assert found.dequantized().shape == x.shape


@oracle_settings
@given(**SHAPES)
def test_an_asymmetric_grid_per_token(tokens: int, inputs: int, size: float, offset: float, seed: int) -> None:
    x = values(tokens, inputs, size, offset, seed)
    found = quantize_dynamic(x, INT8)
    for row, codes, zero_point, step in zip(x.numpy(), found.codes, found.zero_point, found.step, strict=True):
        expected = oracle_asymmetric(row)
        assert (codes.int().tolist(), int(zero_point), step.numpy()[0]) == expected


SPECS = {"asymmetric": INT8, "symmetric": SYMMETRIC, "groups": grouped(16), "ragged groups": grouped(32)}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_dequantized_values_are_within_half_a_step(name: str, size: float) -> None:
    """One step for the asymmetric grid, whose zero point is rounded by itself."""
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)) * size
    found = quantize_dynamic(x, SPECS[name])
    steps = found.step.expand_as(found.codes).flatten(1)[:, :48]
    allowed = (1.0 if name == "asymmetric" else 0.5) * 1.0001
    assert found.codes.abs().max() <= 128
    assert bool(((found.dequantized() - x).abs() <= allowed * steps).all())


@pytest.mark.parametrize("name", SPECS)
def test_fake_quantization_is_dequantized_codes(name: str) -> None:
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = fake_quantize_dynamic(x, SPECS[name])
    assert torch.equal(y, quantize_dynamic(x, SPECS[name]).dequantized())
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("name", ["symmetric", "groups", "ragged groups"])
def test_rows_that_no_scale_fits(name: str) -> None:
    """Zeros, denormals and very large numbers: no NaN, and a code of 0 for what is nothing."""
    rows = torch.tensor([0.0, -0.0, 1e-45, 1e-40, 2.0**-126, 3e38])[:, None] * torch.linspace(-1, 1, 48)
    found = quantize_dynamic(rows, SPECS[name])
    assert bool(found.codes.isfinite().all() and found.step.isfinite().all())
    assert not found.codes[:3].any()
    assert bool(found.dequantized().isfinite().all())
    assert found.codes[5].abs().max() == 127


def test_the_least_range_has_a_normal_step() -> None:
    """Its reciprocal and its step are normal float32, which runtimes that flush denormals keep."""
    found = quantize_dynamic(torch.zeros(1, 4), SYMMETRIC)
    assert found.step.item() == float(f(LEAST_LARGEST) / f(127)) > 2.0**-126
    assert torch.equal(quantize_dynamic(torch.full((1, 4), LEAST_LARGEST), SYMMETRIC).step, found.step)


@pytest.mark.parametrize("name", SPECS)
def test_what_is_rounded_gives_the_codes(name: str) -> None:
    """`unrounded` is what `quantize_dynamic` rounds; an asymmetric grid rounds its zero point, too."""
    spec, x = SPECS[name], torch.randn(6, 70, generator=torch.Generator().manual_seed(3))
    x[2] = 0
    before, found = unrounded(x, spec), quantize_dynamic(x, spec)
    assert before.shape[0] == 6 and before.dtype == torch.float32
    if name == "asymmetric":
        steps, zero_point = before[:, :-1], before[:, -1:]
        assert torch.equal(zero_point.round(), found.zero_point)
        assert torch.equal((steps.round() + found.zero_point).clamp(-128, 127), found.codes)
        return
    codes = found.codes.flatten(1)
    assert before.shape == codes.shape
    near = (before - before.floor() - 0.5).abs() < 1e-4
    assert torch.equal(before.round()[~near], codes[~near])
    assert near.float().mean() < 0.01, "where the two ways to divide differ, the code hangs on the last bit"


def test_what_is_rounded_on_a_static_grid() -> None:
    grid, x = StaticRange(0.25, 3), torch.tensor([[0.1, 0.125, -0.375, 100.0]])
    assert torch.equal(scaled_static(x, grid), x * 4)


def test_no_other_grid_is_taken() -> None:
    for spec in (
        QuantSpec(8, Granularity.PER_GROUP, symmetric=False, group=4, dynamic=True),
        QuantSpec(8, Granularity.PER_TENSOR, dynamic=True),
        QuantSpec(8, Granularity.PER_CHANNEL, dynamic=True),
    ):
        with pytest.raises(ValueError, match="no dynamic activation grid"):
            quantize_dynamic(torch.ones(2, 4), spec)


def test_codes_of_groups_lie_side_by_side_again() -> None:
    codes = Codes(torch.arange(8.0).view(1, 2, 4), torch.zeros(1, 2, 1), torch.tensor([[[1.0], [10.0]]]), 6, True)
    assert codes.dequantized().tolist() == [[0, 1, 2, 3, 40, 50]]
