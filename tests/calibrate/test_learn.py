"""Windows that are held out: nothing is learned on them, they choose the epoch and end the learning."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from afq_export.arch.decoder import family
from afq_export.arch.ops import FloatOps
from afq_export.calibrate import learn
from afq_export.calibrate.calibrate import run_block
from afq_export.calibrate.learn import BlockProblem, learn_block, measure
from afq_export.calibrate.shards import Shards
from afq_export.calibrate.start import start_parameters
from afq_export.calibrate.statistics import input_statistics
from afq_export.fold.forms import choose_forms
from afq_export.load.model import open_model
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.quant import linear_name
from tests.models import write_model

RECIPE = load_recipe("w4a8-g32", ("learning.batch=2", "learning.epochs=4", "learning.learning_rate=0.02"))


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> BlockProblem:
    return block_problem(tmp_path_factory.mktemp("model") / "llama", "llama")


def block_problem(folder: Path, kind: str) -> BlockProblem:
    model = open_model(str(write_model(folder, kind)))
    records = assign(model.config, RECIPE, load_target("android-xnnpack"))
    of_block = {role: records[linear_name(0, role)] for role in family(model.config).linear_shapes(model.config)}
    x = torch.randn(10, 8, model.config.hidden, generator=torch.Generator().manual_seed(1))
    weights = model.block(0)
    y = run_block(model.config, FloatOps(model.config, weights), x, 2)
    return BlockProblem(model.config, weights, of_block, x, (y, y + 0.01), torch.ones(10, 8, 1))


def start_of(problem: BlockProblem):
    seen = input_statistics(problem.config, problem.weights, problem.inputs, 2)
    choices = choose_forms(problem.config, RECIPE.transforms)
    return start_parameters(choices, RECIPE, problem.weights, seen, problem.records)


def learned_from(problem: BlockProblem) -> list[int]:
    batches = problem.batches(3, torch.Generator().manual_seed(0))
    return sorted(int(window) for part in batches for window in part)


@pytest.mark.parametrize(("asked", "expected"), [(0, 0), (1, 1), (2, 2), (5, 2)])
def test_nothing_is_learned_on_what_is_held_out(problem: BlockProblem, asked: int, expected: int) -> None:
    """At most a quarter of ten windows; the rest is learned on, each window once an epoch."""
    held = dataclasses.replace(problem, held_out=asked)
    measured = [int(window) for window in torch.cat(held.measured())]
    assert len(measured) == (expected or len(problem.inputs))
    assert learned_from(held) == [w for w in range(10) if not expected or w not in measured]


def test_too_few_windows_hold_none_out(problem: BlockProblem) -> None:
    few = dataclasses.replace(problem, inputs=problem.inputs[:3], held_out=2)
    assert learned_from(few) == [0, 1, 2] and len(torch.cat(few.measured())) == 3


def test_every_shard_holds_out_as_many(problem: BlockProblem) -> None:
    held = dataclasses.replace(problem, held_out=2, shards=Shards(2))
    assert [len(windows) for windows in held.measured()] == [1, 1]
    batches = held.batches(2, torch.Generator().manual_seed(0))
    assert all(len(part) == 2 and part[0] < 5 <= part[1] for part in batches)
    assert not set(torch.cat(batches).tolist()) & set(torch.cat(held.measured()).tolist())


def test_losses_are_those_of_the_held_out_windows(problem: BlockProblem) -> None:
    held = dataclasses.replace(problem, held_out=2)
    start = start_of(problem)
    rows = torch.cat(held.measured())
    targets = tuple(target[rows] for target in problem.targets)
    alone = dataclasses.replace(
        problem, inputs=problem.inputs[rows], targets=targets, token_weights=torch.ones(2, 8, 1)
    )
    assert measure(held, start, 0.0, 0.0, 2) == pytest.approx(measure(alone, start, 0.0, 0.0, 2), rel=1e-6)


def test_the_epoch_that_is_best_on_them_is_kept(problem: BlockProblem) -> None:
    held = dataclasses.replace(problem, held_out=2)
    found = learn_block(held, start_of(problem), RECIPE.learning, 0, lambda epoch, epochs: None)
    losses = [record.held for record in found.epochs]
    assert len(losses) == 4 and found.final_loss == min(losses) < found.start_loss
    assert found.opened == (losses.index(min(losses)) + 1) / 4


def test_learning_ends_when_patience_does(problem: BlockProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses on the held-out windows: the start's, then an epoch that is better, then only worse ones."""
    losses = iter([3.0, 1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(learn, "measure", lambda *arguments: next(losses))
    patient = dataclasses.replace(problem, held_out=2)
    learning = load_recipe("w4a8-g32", ("learning.epochs=9", "learning.patience=2")).learning
    found = learn_block(patient, start_of(problem), learning, 0, lambda epoch, epochs: None)
    assert [record.held for record in found.epochs] == [1.0, 2.0, 2.0]
    assert found.opened == 1 / 9 and found.final_loss == 1.0


def test_the_mask_is_made_once_an_epoch(problem: BlockProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    from afq_export.calibrate import parameters

    made = []
    build = parameters.gradual_mask
    monkeypatch.setattr(parameters, "gradual_mask", lambda *key: made.append(key[:3]) or build(*key))
    learning = load_recipe("w4a8-g32", ("learning.epochs=2", "learning.batch=1")).learning
    learn_block(problem, start_of(problem), learning, 0, lambda epoch, epochs: None)
    assert len(made) <= 4 * 2 + 2 and {opened for _, opened, _ in made} == {0.0, 0.5, 1.0}
