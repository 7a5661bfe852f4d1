"""Asymmetric GPTQ: the identity it stands on, and that it comes nearer to the float path than rounding errors alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.arch.decoder import embed
from afq_export.calibrate import gptq as module
from afq_export.calibrate.calibrate import calibrate
from afq_export.calibrate.gptq import corrected, gptq_block
from afq_export.calibrate.learn import BlockProblem
from afq_export.errors import InputError
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.model import open_model
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.quant import linear_name
from afq_export.spec.recipe import Rounding
from tests.calibrate.test_rounding import windows
from tests.models import write_model

TARGET = load_target("android-xnnpack")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(outputs=st.integers(1, 6), inputs=st.integers(1, 12), seed=st.integers(0, 99))
def test_errors_towards_the_float_output_differ_as_those_towards_v_do(outputs: int, inputs: int, seed: int) -> None:
    """|f W^T - q Q^T|^2 - |q (V - Q)^T|^2 is the same for every Q: V is all that GPTQ has to know of the float path."""
    generator = torch.Generator().manual_seed(seed)
    q, noise = (torch.randn(40, inputs, generator=generator, dtype=torch.float64) for _ in range(2))
    f = q + 0.3 * noise
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CORRECTION_DAMPING", 0.0)
        target = corrected(weight, q.T @ q, (f - q).T @ q)
    constants = []
    for _ in range(2):
        codes = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
        whole = (f @ weight.T - q @ codes.T).square().sum()
        constants.append(float(whole - (q @ (target - codes).T).square().sum()))
    assert constants[0] == pytest.approx(constants[1], rel=1e-9, abs=1e-9)


def test_without_a_difference_nothing_is_corrected() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        corrected(weight, torch.eye(5, dtype=torch.float64), torch.zeros(5, 5).double()), weight.double()
    )


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FloatCheckpoint:
    return open_model(str(write_model(tmp_path_factory.mktemp("model") / request.param, request.param)))


def problem(model: FloatCheckpoint) -> BlockProblem:
    records = assign(model.config, load_recipe("w4a8-g32+rtn"), TARGET)
    x = embed(model.config, model.embedding(), windows().ids_NT)
    of_block = {r.spec.role: r for name, r in records.items() if name.startswith("blocks.0.")}
    return BlockProblem(model.config, model.block(0), of_block, x, (x,), torch.ones(*x.shape[:2], 1))


def test_every_linear_gets_codes_on_what_the_linears_before_it_give(model: FloatCheckpoint) -> None:
    found = problem(model)
    clips = {role: torch.ones(r.spec.outputs, r.spec.groups) for role, r in found.records.items()}
    plain = gptq_block(found, found.weights, clips, None, Rounding(method="gptq"))
    towards = gptq_block(found, found.weights, clips, found.inputs, Rounding(method="gptq"))
    assert plain.keys() == towards.keys() == found.records.keys()
    last = list(found.records)[-1]
    assert not torch.equal(plain[last], towards[last]), "8-bit inputs and rounded linears before it make a difference"
    unseen = dataclasses.replace(found, inputs=found.inputs * 0)
    assert gptq_block(unseen, found.weights, clips, unseen.inputs, Rounding(method="gptq")).keys() == plain.keys()


@pytest.mark.parametrize("autocast", ["float32", "bfloat16"])
def test_second_moments_are_float32_products_whatever_the_block_runs_in(
    model: FloatCheckpoint, monkeypatch: pytest.MonkeyPatch, autocast: str
) -> None:
    """With fewer tokens than inputs most eigenvalues are 0: products in bfloat16 would make them negative."""
    found, least = problem(model), []
    few = dataclasses.replace(found, inputs=found.inputs[:1, :8])
    clips = {role: torch.ones(r.spec.outputs, r.spec.groups) for role, r in found.records.items()}
    rounded = module.gptq

    def seen(weight: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor, *limits: int) -> torch.Tensor:
        least.append(float(torch.linalg.eigvalsh(hessian)[0] / hessian.trace()))
        return rounded(weight, scales, hessian, *limits)

    monkeypatch.setattr(module, "gptq", seen)
    gptq_block(few, found.weights, clips, few.inputs, Rounding(method="gptq", autocast=autocast))
    assert len(least) == len(found.records) and min(least) > -1e-6


def test_towards_the_float_path_the_blocks_come_nearer_to_it(model: FloatCheckpoint, tmp_path: Path) -> None:
    losses = []
    for asymmetric in ("false", "true"):
        changes = ("rounding.method=gptq", f"rounding.asymmetric={asymmetric}")
        recipe = load_recipe("w4a8-g32+awq", changes)
        folder = tmp_path / asymmetric
        done = calibrate(model, recipe, assign(model.config, recipe, TARGET), windows(), folder, 0, silent)
        losses.append(sum(done.block(index).history.final_loss for index in range(model.config.layers)))
    assert losses[1] < losses[0]


def test_a_hessian_that_is_not_positive_definite_is_one_line(
    model: FloatCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DAMPING", -2.0)
    found = problem(model)
    clips = {role: torch.ones(r.spec.outputs, r.spec.groups) for role, r in found.records.items()}
    with pytest.raises(InputError, match=linear_name(0, "q_proj")):
        gptq_block(found, found.weights, clips, None, Rounding(method="gptq"))
