"""Recording, and the life of a baseline: made, updated, updated again, and what it remembers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from afq_export.errors import InputError, VerdictError
from afq_export.guard.baseline import (
    create,
    first_losses,
    mean_divergence,
    refuse_overwriting,
    stored_tokens,
    today,
    update,
)
from afq_export.guard.compare import agreement, paired
from afq_export.guard.facts import differences
from afq_export.guard.gates import drift_gate
from afq_export.guard.record import record
from afq_export.guard.speed import measure_speed
from afq_export.guard.subject import Measured
from afq_export.guard.tokens import KEPT, Tokens, nats
from afq_export.progress import silent
from afq_export.spec.baseline import Baseline
from afq_export.validate.evaluate import measure
from tests.guard.sample import baseline, facts, protocol, tokens

WINDOWS, LENGTH, VOCAB = 3, 20, 30
SAID = {"who": "Ada", "what": "a new recipe", "why": "it is smaller"}


class Table:
    """A session whose logits are a fixed row for each token."""

    context, prefill = 64, 64

    def __init__(self, rows: Tensor) -> None:
        self._rows, self.vocab = rows, rows.shape[1]

    def logits(self, ids: Tensor) -> Tensor:
        return self._rows[ids]

    def extend(self, ids: Tensor, position: int) -> Tensor:
        return self._rows[ids]


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def ids_NT() -> Tensor:
    return torch.randint(0, VOCAB, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))


def test_what_is_recorded(rows: Tensor, ids_NT: Tensor) -> None:
    """Losses and choices are those of `perplexity`; the likeliest choices and the rest by their definition."""
    stats, kept, none = record(Table(rows), ids_NT, silent)
    expected = measure({"model": Table(rows)}, ids_NT).rungs["model"]
    assert none is None and (stats.nll == expected.nll).all() and (kept.nll == expected.nll.float().numpy()).all()
    assert (kept.top1 == expected.top1.numpy()).all() and (kept.ids[..., 0] == kept.top1).all()
    logs = rows[ids_NT[:, :-1]].double().log_softmax(-1)
    likeliest = logs.sort(-1, descending=True)
    assert (kept.ids == likeliest.indices[..., :KEPT].numpy()).all()
    rest = likeliest.values[..., KEPT:].logsumexp(-1, keepdim=True)
    buckets = torch.cat([likeliest.values[..., :KEPT], rest], -1)
    assert np.abs(nats(kept.logs) - buckets.numpy()).max() < 1e-3
    same_rows = ids_NT[:, :-1].unique().numel()
    assert len(np.unique(kept.digest)) == same_rows, "equal logits have one digest, others another"


def test_looked_up_in_another_session(rows: Tensor, ids_NT: Tensor) -> None:
    _, kept, _ = record(Table(rows), ids_NT, silent)
    _, same, there = record(Table(rows.clone()), ids_NT, silent, kept)
    assert there is not None and (there == kept.logs).all() and (same.digest == kept.digest).all()
    other = rows.clone()
    other[:, 3] += 1.0
    _, moved, there = record(Table(other), ids_NT, silent, kept)
    assert (moved.digest != kept.digest).all() and there is not None
    whole = (
        rows.double().log_softmax(-1).exp() * (rows.double().log_softmax(-1) - other.double().log_softmax(-1))
    ).sum(-1)
    found = mean_divergence(kept, Measured(facts(), moved, there))
    assert 0 < found <= float(whole[ids_NT[:, :-1]].mean()) + 1e-4


def test_another_vocabulary_is_refused(rows: Tensor, ids_NT: Tensor) -> None:
    _, kept, _ = record(Table(rows), ids_NT, silent)
    with pytest.raises(InputError, match="another vocabulary: it holds token 29, the program has 29"):
        record(Table(rows[:, :29]), ids_NT % 29, silent, kept)


def test_logits_that_are_no_numbers(rows: Tensor, ids_NT: Tensor) -> None:
    """Recorded without a warning, refused as a baseline, and failed by the gate."""
    _, kept, _ = record(Table(rows), ids_NT, silent)
    broken = rows.clone()
    broken[ids_NT[1, 4], 2] = torch.nan
    stats, now, there = record(Table(broken), ids_NT, silent, kept)
    assert stats.nll.isnan().any()
    with pytest.raises(VerdictError, match=r"the bundle is broken: [0-9]+ losses are no finite number"):
        create(Measured(facts(), now, there), protocol(WINDOWS, LENGTH))
    assert paired(now.nll, kept.nll).drift.value == math.inf


def test_speed_is_of_the_session(rows: Tensor, ids_NT: Tensor) -> None:
    speed = measure_speed(Table(rows), ids_NT[0])
    assert speed.decode > 0 and 0 < speed.prefill < math.inf


def moved(by: float, start: Tokens | None = None) -> Measured:
    """The sample's tokens with every loss higher by about `by` nats."""
    start = start or tokens()
    noise = np.random.default_rng(5).normal(0, 1e-4, start.nll.shape)
    now = dataclasses.replace(start, nll=(start.nll + by + noise).astype(np.float32))
    return Measured(facts(recipe=f"moved {by}"), now, start.logs)


def test_a_baseline_remembers_where_it_started() -> None:
    """Four updates of 0.4 %, each within its limit: the fourth is beyond the limit since the first."""
    start = create(Measured(facts(), tokens(), None), protocol())
    assert start.updates == () and (first_losses(start, "") == tokens().nll).all()
    now, answers = start, []
    for step in range(1, 5):
        measured = moved(0.004 * step)
        drift = paired(measured.tokens.nll, stored_tokens(now, "").nll)
        whole = paired(measured.tokens.nll, first_losses(now, ""))
        answers.append((drift.against(0.005), whole.against(0.01)))
        now = update(now, measured, **SAID, where="")
    assert answers == [("passed", "passed"), ("passed", "passed"), ("passed", "failed"), ("passed", "failed")]
    assert (first_losses(now, "") == tokens().nll).all() and now.created == start.created
    assert [entry.before.recipe for entry in now.updates][:2] == ["w8a8-dynamic", "moved 0.004"]
    assert now.updates[-1].cumulative.value == pytest.approx(math.expm1(0.016), rel=1e-2)
    assert now.updates[-1].drift.value == pytest.approx(math.expm1(0.004), rel=2e-2)
    assert now.facts.recipe == "moved 0.016"
    assert {entry.who for entry in now.updates} == {"Ada"}


@pytest.mark.parametrize("empty", ["who", "what", "why"])
def test_an_update_says_who_what_and_why(empty: str) -> None:
    with pytest.raises(InputError, match=f"an update says who, what and why: --{empty} is empty"):
        update(baseline(), moved(0.0), **(SAID | {empty: "  "}), where="")


def test_the_date_of_a_reproducible_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    made: Baseline = create(Measured(facts(), tokens(), None), protocol())
    assert made.created == "1970-01-02"
    for beyond in ("9" * 14, "9" * 30, "9" * 5000):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", beyond)
        with pytest.raises(InputError, match="SOURCE_DATE_EPOCH is no date"):
            today()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    refuse_overwriting(tmp_path / "new.afqb")
    (tmp_path / "old.afqb").write_bytes(b"")
    with pytest.raises(InputError, match=r"there is a baseline already .*use `afq-export baseline update`"):
        refuse_overwriting(tmp_path / "old.afqb")


def test_the_same_bundle_has_no_drift_and_agrees() -> None:
    same = moved(0.0)
    assert agreement(same.tokens, tokens()) == 1.0
    assert drift_gate("drift", paired(tokens().nll, tokens().nll), 0.005, protocol()).status == "passed"


def test_facts_that_differ_are_named() -> None:
    now = msgspec.structs.replace(
        facts(),
        recipe="w4a8",
        settings={"graph_optimization_level": "basic"},
        files={"model.onnx": "x", "config.json": "y", "added.json": "z"},
        versions={"onnxruntime": "1.32.0", "torch": "2.13.0"},
    )
    assert [(d.name, d.was, d.now) for d in differences(facts(), now)] == [
        ("recipe", "w8a8-dynamic", "w4a8"),
        ("option graph_optimization_level", "all", "basic"),
        ("file added.json", None, "z"),
        ("file config.json", "e" * 64, "y"),
        ("version of onnxruntime", "1.31.1", "1.32.0"),
    ]
    assert differences(facts(), facts()) == ()
