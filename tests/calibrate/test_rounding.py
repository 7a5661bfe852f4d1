"""Rounding after the transforms: GPTQ against a slow oracle, learned against nearest, what is saved is used."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.calibrate.calibrate import calibrate
from afq_export.calibrate.gptq import gptq
from afq_export.calibrate.result import Calibration, read_block, write_block
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.corpus import Windows
from afq_export.load.model import open_model
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.quantize.grid import round_with_offsets, rounded_codes, weight_codes
from afq_export.quantize.quantize import quantize_block
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.quant import Granularity, QuantSpec, linear_name
from tests.models import write_model

TARGET = load_target("android-xnnpack")
INT4 = QuantSpec(4, Granularity.PER_CHANNEL)


def error(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = weight.double() - codes.double() * scales.double()
    return float(torch.einsum("oi,ij,oj->", difference, hessian.double(), difference))


def problem(outputs: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, scales for every weight, and the Hessian of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(64, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    scales = (weight.abs().amax(1, keepdim=True) / 7).expand_as(weight)
    return weight, scales, x.T @ x


@settings(max_examples=25, deadline=None, derandomize=True)
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 150), seed=st.integers(0, 99))
def test_gptq_is_never_worse_than_nearest_where_inputs_hang_together(outputs: int, inputs: int, seed: int) -> None:
    weight, scales, hessian = problem(outputs, inputs, seed)
    nearest = (weight / scales).round().clamp(-8, 7)
    codes = gptq(weight, scales, hessian, -8, 7)
    assert codes.dtype == torch.int8 and int(codes.min()) >= -8 and int(codes.max()) <= 7
    # Greedy: not better for every single matrix, but never far off, and clearly better on the whole (next test).
    assert error(weight, codes, scales, hessian) <= 1.25 * error(weight, nearest, scales, hessian) + 1e-9


def test_gptq_halves_the_error_of_nearest() -> None:
    ratios = []
    for seed in range(5):
        weight, scales, hessian = problem(16, 96, seed)
        nearest = (weight / scales).round().clamp(-8, 7)
        ratios.append(
            error(weight, gptq(weight, scales, hessian, -8, 7), scales, hessian)
            / error(weight, nearest, scales, hessian)
        )
    assert np.mean(ratios) < 0.5


def test_gptq_without_correlation_is_nearest() -> None:
    weight, scales, _ = problem(5, 40, 0)
    codes = gptq(weight, scales, torch.diag(torch.rand(40) + 0.1), -8, 7)
    assert torch.equal(codes.float(), (weight / scales).round().clamp(-8, 7))


def test_gptq_comes_near_the_best_of_all_roundings() -> None:
    """Five weights: every combination of up and down is tried."""
    weight, scales, hessian = problem(1, 5, 3)
    low = (weight / scales).floor()
    best = min(
        error(weight, low + torch.tensor([up]), scales, hessian) for up in itertools.product((0.0, 1.0), repeat=5)
    )
    assert error(weight, gptq(weight, scales, hessian, -8, 7), scales, hessian) <= 2.0 * best


def test_columns_that_are_never_seen_do_no_harm() -> None:
    weight, scales, hessian = problem(3, 12, 1)
    hessian[4], hessian[:, 4] = 0, 0
    codes = gptq(weight, scales, hessian, -8, 7)
    assert torch.equal(codes[:, 4].float(), (weight / scales)[:, 4].round())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(inputs=st.integers(1, 70), group=st.sampled_from([0, 16, 32]), seed=st.integers(0, 99))
def test_offsets_round_what_they_say_and_zero_is_nearest(inputs: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(4, Granularity.PER_GROUP if group else Granularity.PER_CHANNEL, group=group)
    weight = torch.randn(3, inputs, generator=generator)
    scales = torch.rand(3, spec.groups(inputs), generator=generator) * 0.2 + 0.1
    width = group or inputs
    offsets = torch.rand(3, spec.groups(inputs), width, generator=generator) - 0.5
    assert torch.equal(rounded_codes(weight, scales, offsets * 0, spec), weight_codes(weight, scales, spec))
    codes = rounded_codes(weight, scales, offsets, spec)
    columns = scales.repeat_interleave(width, 1)[:, :inputs]
    assert torch.equal(codes.float() * columns, round_with_offsets(weight, scales, offsets, spec))
    assert int((codes.int() - weight_codes(weight, scales, spec).int()).abs().max()) <= 1


def test_the_gradient_of_an_offset_is_its_scale_inside_the_grid_and_nothing_outside() -> None:
    weight, scales = torch.tensor([[0.31, 5.0, -0.12]]), torch.tensor([[0.1]])
    offsets = torch.zeros(1, 1, 3, requires_grad=True)
    round_with_offsets(weight, scales, offsets, INT4).sum().backward()
    assert torch.allclose(offsets.grad, torch.tensor([[[0.1, 0.0, 0.1]]]))


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FloatCheckpoint:
    return open_model(str(write_model(tmp_path_factory.mktemp("model") / request.param, request.param)))


def windows() -> Windows:
    ids = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(5))
    return Windows(ids, "random", "-", 24, 6, "-", 24)


def run(model: FloatCheckpoint, folder: Path, *changes: str) -> Calibration:
    recipe = load_recipe("w4a8-g32+awq", ("rounding.steps=40", "rounding.batch=2", "rounding.rate=0.02", *changes))
    return calibrate(model, recipe, assign(model.config, recipe, TARGET), windows(), folder, 0, silent)


def test_learned_rounding_beats_nearest_and_what_is_saved_is_what_is_quantized(
    model: FloatCheckpoint, tmp_path: Path
) -> None:
    recipe = load_recipe("w4a8-g32+awq")
    records = assign(model.config, recipe, TARGET)
    nearest = run(model, tmp_path / "nearest", "rounding.method=nearest")
    learned = run(model, tmp_path / "learned", "rounding.method=learned")
    for index in range(model.config.layers):
        assert not nearest.block(index).codes
        result = learned.block(index)
        assert result.history.final_loss <= result.history.start_loss
        part = quantize_block(FoldedCheckpoint(model, learned.transforms()), result, records, index)
        for linear in part.linears:
            assert torch.equal(linear.codes, result.codes[linear.spec.role])
            assert records[linear_name(index, linear.spec.role)].spec == linear.spec
    losses = [[c.block(i).history.final_loss for i in range(model.config.layers)] for c in (nearest, learned)]
    assert sum(losses[1]) < 0.8 * sum(losses[0])


@pytest.mark.parametrize("method", ["gptq", "learned"])
def test_the_same_seed_gives_the_same_codes_and_files_keep_them(
    model: FloatCheckpoint, tmp_path: Path, method: str
) -> None:
    first, second = (run(model, tmp_path / name, f"rounding.method={method}") for name in ("a", "b"))
    for index in range(model.config.layers):
        ours, theirs = first.block(index), second.block(index)
        assert ours.codes and all(torch.equal(codes, theirs.codes[role]) for role, codes in ours.codes.items())
        write_block(tmp_path / "again", ours)
        again = read_block(tmp_path / "again")
        assert all(torch.equal(codes, again.codes[role]) for role, codes in ours.codes.items())
        assert all(codes.dtype == torch.int8 for codes in again.codes.values())


def test_the_scale_that_the_kernel_rounds_is_rounded_while_learning(model: FloatCheckpoint, tmp_path: Path) -> None:
    """qb4w keeps bfloat16 scales: the codes that come out belong to those."""
    learned = run(model, tmp_path / "learned", "rounding.method=learned")
    recipe = load_recipe("w4a8-g32+awq")
    part = quantize_block(
        FoldedCheckpoint(model, learned.transforms()), learned.block(0), assign(model.config, recipe, TARGET), 0
    )
    grouped = [linear for linear in part.linears if linear.spec.weight.group]
    assert grouped and all(torch.equal(lin.scales, lin.scales.bfloat16().float()) for lin in grouped)
