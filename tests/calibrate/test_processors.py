"""Calibration computes where its weights and windows are.

There is no GPU here: everything is put on the device that has no memory (meta), and any operation on tensors of two
devices is an error, as it would be there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afq_export import machine
from afq_export.arch.decoder import embed
from afq_export.calibrate.learn import BlockProblem, learn_block
from afq_export.calibrate.ops import token_power, token_weights
from afq_export.calibrate.start import quantize_rows
from afq_export.errors import InputError, MissingToolError
from afq_export.job import resolve
from afq_export.quantize.activations import INT8
from afq_export.spec.catalog import load_recipe
from afq_export.spec.request import Request
from tests.calibrate.test_learn import block_problem, start_of

ELSEWHERE = torch.device("meta")
MAY_MIX = {"aten::index.Tensor", "aten::_to_copy", "aten::copy_"}
"""Windows are chosen by numbers of the processor's, and copies go from one device to another."""


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices; every number that is read from a tensor elsewhere is 0.5."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if function is torch.ops.aten._local_scalar_dense.default and tensors[0].device == ELSEWHERE:
            return 0.5
        devices = {tensor.device for tensor in tensors if tensor.dim()}
        if len(devices) > 1 and function.name() not in MAY_MIX:
            raise AssertionError(f"{function.name()} on {devices}")
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["llama-biased", "opt"])
def problem(request: pytest.FixtureRequest, tmp_path: Path) -> BlockProblem:
    return block_problem(tmp_path / request.param, request.param)


def moved(problem: BlockProblem) -> BlockProblem:
    weights = {name: tensor.to(ELSEWHERE) for name, tensor in problem.weights.items()}
    x, importance, *targets = (t.to(ELSEWHERE) for t in (problem.inputs, problem.token_weights, *problem.targets))
    return BlockProblem(problem.config, weights, problem.records, x, tuple(targets), importance, held_out=2)


def test_two_devices_are_told_apart() -> None:
    with OneDevice(), pytest.raises(AssertionError, match=r"aten::mul.*on"):
        torch.ones(3, device=ELSEWHERE) * torch.ones(3)


def test_a_block_is_learned_where_it_is(problem: BlockProblem) -> None:
    """Statistics, searched start values, forward and backward, the optimiser, measurements; transforms in float64."""
    learning = load_recipe("w4a8-g32", ("learning.epochs=1", "learning.batch=8")).learning
    with OneDevice():
        there = moved(problem)
        found = learn_block(there, start_of(there), learning, 0, lambda epoch, epochs: None)
        transforms = found.parameters.transforms(found.opened, found.stability_factor, torch.float64)
    assert len(found.epochs) == 1 and found.events == ()
    assert {parameter.device for parameter in found.parameters.parameters()} == {ELSEWHERE}
    assert {transform.matrix.device for transform in transforms.values()} == {ELSEWHERE}


def test_token_rows_positions_and_weights_are_there_too(problem: BlockProblem) -> None:
    config = problem.config
    with OneDevice():
        rows = {"embed_tokens.weight": torch.ones(config.vocab, config.hidden, device=ELSEWHERE)}
        if config.family == "opt":
            rows["embed_positions.weight"] = torch.ones(config.max_positions + 2, config.hidden, device=ELSEWHERE)
        x = embed(config, rows, torch.zeros(2, 8, dtype=torch.int64, device=ELSEWHERE))
        power = token_power(x)
        assert x.device == token_weights(power, power.mean(), "balanced").device == ELSEWHERE
        assert quantize_rows(x[0], INT8).device == ELSEWHERE


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.processor("auto") == machine.processor("cpu") == "cpu"
    with pytest.raises(MissingToolError, match=r"no such device \[--device cuda\]: torch finds no CUDA GPU here; take"):
        machine.processor("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (machine.processor("auto"), machine.processor("cuda"), machine.processor("cpu")) == ("cuda", "cuda", "cpu")
    assert machine.processor("auto", processes=2) == "cpu"
    with pytest.raises(InputError, match="no GPU for several processes"):
        machine.processor("cuda", processes=2)


def test_what_was_learned_on_is_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Request(target="linux-x64-ort", recipe="w4a8-g32", tiny=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = resolve(asked, lowers=False).fingerprint()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve(asked, lowers=False).fingerprint() == on_cpu | {"device": "cuda"}
