"""The report and its verdict for a runtime that is right, near, wrong, missing; the explanation of disagreements."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch

from afq_export.arch import decoder
from afq_export.errors import MissingToolError
from afq_export.spec import report as spec
from afq_export.validate.departures import NEAR_TIE, explain_disagreements, flipped_steps
from afq_export.validate.evaluate import Measurement, PairStats, TokenStats, hidden_states, measure
from afq_export.validate.ladder import Runtime, Subject, validate
from afq_export.validate.rungs import TorchParts, integer_rung
from tests.checkpoints import DequantizedWeights, random_checkpoint, random_windows, small_config, xnnpack_target
from tests.validate.test_fold_check import Scaled
from tests.validate.test_layers import model_probe

MODEL = spec.Model(name="tiny", digest="2" * 64, type="llama")


class IntegerSession:
    """A runtime whose logits are those of the integer rung in another dtype, then `change`d."""

    vocab, context, prefill = 96, 64, 8

    def __init__(self, checkpoint, change=lambda logits: logits, dtype=torch.float64):
        self.rung, self.change = integer_rung(checkpoint, xnnpack_target(), dtype), change

    @torch.no_grad()
    def logits(self, ids):
        return self.change(decoder.head(self.rung.head(), hidden_states(self.rung, ids[None]))[0].float())


def subject_of(checkpoint, **changes) -> Subject:
    original = DequantizedWeights(checkpoint)
    subject = Subject(
        checkpoint=checkpoint,
        # Random weights flip many codes: the floors of a trained model are not theirs.
        target=xnnpack_target(agreement_floor=0.5, perplexity_budget=0.2),
        windows=random_windows(checkpoint.config),
        model=MODEL,
        recipe="w8a8-dynamic",
        original=original,
        folded=original,
    )
    return dataclasses.replace(subject, **changes)


def statuses(report):
    return {check.name: check.status for check in report.checks}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("ladder") / "quantized", small_config())


def test_a_right_runtime_passes(checkpoint):
    runtime = Runtime(lambda: IntegerSession(checkpoint, dtype=torch.float32), model_probe)
    report = validate(subject_of(checkpoint), runtime)
    assert report.verdict == "pass"
    assert set(statuses(report).values()) == {"passed"}
    assert report.agreement.top1 == 1
    assert report.agreement.kl == pytest.approx(0, abs=1e-9)
    assert report.agreement.disagreements == ()
    assert list(report.agreement.against_float) == ["folded", "fake_quant", "integer", "runtime"]
    assert report.agreement.against_float["folded"].kl == 0
    assert [figure.tokens for _, figure in report.perplexity.items()] == [45] * 5
    assert report.perplexity.runtime.value == pytest.approx(report.perplexity.integer.value)
    assert report.fold.max_relative_error_float64 == 0
    assert report.first_departure is None
    assert len(report.layers) == len(checkpoint.records)
    assert report.protocol.windows == 3


def test_the_report_survives_json(checkpoint):
    runtime = Runtime(lambda: IntegerSession(checkpoint), model_probe)
    report = validate(subject_of(checkpoint), runtime)
    text = spec.to_json(report)
    assert spec.read_report(text.encode()) == report
    plain = msgspec.json.decode(text)
    assert plain["schema_version"] == 1
    assert set(plain["perplexity"]) == {"float", "folded", "fake_quant", "integer", "runtime"}
    assert set(plain["perplexity"]["float"]) == {"value", "stderr", "tokens"}
    assert {"name", "kernel", "exact", "max_steps", "sqnr_db"} <= set(plain["layers"][0])
    assert {"top1", "kl"} <= set(plain["agreement"])
    assert set(plain["coverage"]) == {"lowered", "refused", "estimates"}
    assert set(plain["cost"]) == {"calibrate_s", "export_s", "peak_rss_mb"}
    assert "max_relative_error_float64" in plain["fold"]


def test_a_missing_runtime_is_skipped_and_fails_the_verdict(checkpoint):
    def missing(*_):
        raise MissingToolError("no executorch", do="pip install executorch")

    report = validate(subject_of(checkpoint), Runtime(missing, missing))
    assert report.verdict == "fail"
    skipped = {name for name, status in statuses(report).items() if status == "skipped"}
    assert skipped == {"rung runtime", "layers", "perplexity", "agreement", "disagreements"}
    assert report.perplexity.runtime is None
    assert report.agreement.top1 is None
    assert "no executorch" in next(c.detail for c in report.checks if c.name == "rung runtime")


def test_a_target_that_nothing_here_runs_is_compiled_never_pass(checkpoint):
    absent = Runtime(None, None, absent="there is no such device")
    lowered = tuple(spec.Lowered(name, record.kernel) for name, record in checkpoint.records.items())
    compiles = xnnpack_target(status="compiles")

    def verdict_for(target, found):
        return validate(subject_of(checkpoint, target=target, coverage=spec.Coverage(found)), absent)

    report = verdict_for(compiles, lowered)
    assert report.verdict == "compiled" and report.perplexity.runtime is None and report.layers == ()
    assert {c.name: c.detail for c in report.checks if c.status == "skipped"}[
        "rung runtime"
    ] == "there is no such device"
    assert statuses(report)["integers"] == "passed"
    assert verdict_for(compiles, lowered[1:]).verdict == "fail"  # a linear is not in the file
    assert verdict_for(compiles, ()).verdict == "fail"  # nothing was read back
    assert verdict_for(xnnpack_target(), lowered).verdict == "fail"  # what must run was not run


def test_a_missing_source_is_skipped_and_said(checkpoint):
    runtime = Runtime(lambda: IntegerSession(checkpoint, dtype=torch.float32), model_probe)
    report = validate(subject_of(checkpoint, original=None, folded=None, source_missing="offline"), runtime)
    assert report.verdict == "pass"
    skipped = [check for check in report.checks if check.status == "skipped"]
    assert [check.name for check in skipped] == ["rung float", "rung folded", "fold"]
    assert all(check.detail == "offline" for check in skipped)
    assert report.perplexity.float_ is None


def test_windows_beyond_the_context_skip_the_runtime(checkpoint):
    runtime = Runtime(lambda: IntegerSession(checkpoint), model_probe)
    windows = random_windows(checkpoint.config, count=1, length=64)
    IntegerSession.context, before = 32, IntegerSession.context
    try:
        report = validate(subject_of(checkpoint, windows=windows), runtime)
    finally:
        IntegerSession.context = before
    assert statuses(report)["rung runtime"] == "skipped"
    assert report.verdict == "fail"


def test_another_model_in_the_runtime_fails(checkpoint):
    runtime = Runtime(lambda: IntegerSession(checkpoint, lambda logits: logits.roll(1, -1)), model_probe)
    report = validate(subject_of(checkpoint), runtime)
    assert report.verdict == "fail"
    assert statuses(report)["agreement"] == "failed"


def test_a_wrong_layer_is_the_first_departure(checkpoint):
    def probe(linears, inputs):
        outputs = model_probe(linears, inputs)
        for name in ("blocks.1.down_proj", "blocks.1.o_proj"):
            if name in outputs:
                outputs[name] = outputs[name] + 0.1
        return outputs

    report = validate(subject_of(checkpoint), Runtime(lambda: IntegerSession(checkpoint), probe))
    assert report.verdict == "fail"
    assert statuses(report)["layers"] == "failed"
    assert report.first_departure == "blocks.1.o_proj"


def test_a_wrong_fold_fails(checkpoint):
    runtime = Runtime(lambda: IntegerSession(checkpoint, dtype=torch.float32), model_probe)
    report = validate(subject_of(checkpoint, folded=Scaled(checkpoint, slip=0.1)), runtime)
    assert report.verdict == "fail"
    assert statuses(report)["fold"] == "failed"
    assert report.fold.first_block == "blocks.1"


def measured(same, margin) -> Measurement:
    """A measurement with one window whose second choice differs by `margin`."""
    top1 = torch.zeros(1, len(same), dtype=torch.int64)
    stats = TokenStats(nll=torch.zeros(1, len(same)), top1=top1)
    pair = PairStats(torch.tensor([same]), torch.zeros(1, len(same)), torch.tensor([margin]), torch.tensor([same]))
    return Measurement({"integer": stats, "runtime": stats}, {("integer", "runtime"): pair})


def test_disagreements_are_explained(checkpoint):
    """A near tie by its margin; a large margin by a code that depends on the last bits; else nothing explains it."""
    ids = random_windows(checkpoint.config, count=1, length=48).ids_NT
    flips = list(flipped_steps(checkpoint, xnnpack_target(), ids[0]))
    assert flips, "48 tokens of a random model hold some activation at a rounding border"
    first = min(flip.position for flip in flips)
    same, margin = [True] * 47, [0.0] * 47
    for position, gap in ((first, 0.3), (46, NEAR_TIE / 2)):
        same[position], margin[position] = False, gap
    if first:
        same[0], margin[0] = False, 0.3
    found = explain_disagreements(checkpoint, xnnpack_target(), ids, measured(same, margin))
    by_position = {item.position: item for item in found}
    assert by_position[46].reason == "near_tie"
    assert by_position[first].reason == "flipped_step"
    assert by_position[first].layer in {flip.layer for flip in flips if flip.position <= first}
    if first:
        assert by_position[0].reason == "unexplained"


def test_an_unexplained_disagreement_fails(checkpoint, monkeypatch):
    monkeypatch.setattr("afq_export.validate.departures.flipped_steps", lambda *_: [])
    runtime = Runtime(
        lambda: IntegerSession(checkpoint, lambda logits: logits.index_fill(1, torch.tensor([7]), 99.0)), model_probe
    )
    report = validate(subject_of(checkpoint), runtime)
    assert statuses(report)["disagreements"] == "failed"


def test_float64_between_linears_is_a_runtime_like_any_other(checkpoint):
    """Every disagreement of a runtime that differs in float bits only is explained."""
    windows = random_windows(checkpoint.config, count=4, length=64)
    rungs = {"integer": integer_rung(checkpoint, xnnpack_target()), "runtime": IntegerSession(checkpoint)}
    measurement = measure(rungs, windows.ids_NT, [("integer", "runtime")])
    found = explain_disagreements(checkpoint, xnnpack_target(), windows.ids_NT, measurement)
    assert all(item.reason != "unexplained" for item in found)


class ShiftedParts(TorchParts):
    """A runtime's float operators, `error` off torch's."""

    name = "shifted"

    def __init__(self, error: float) -> None:
        self.scale = 1 + error

    def norm(self, config, weights, role, x):
        return super().norm(config, weights, role, x) * self.scale


@pytest.mark.parametrize(("error", "status"), [(1e-6, "passed"), (1e-3, "failed")])
def test_the_runtimes_float_operators_are_held_against_torchs(checkpoint, error, status):
    """The reference takes them, so a wrong one would agree with itself: it fails by its distance from torch."""
    runtime = Runtime(
        lambda: IntegerSession(checkpoint, dtype=torch.float32), model_probe, lambda *_: ShiftedParts(error)
    )
    report = validate(subject_of(checkpoint), runtime)
    assert statuses(report)["float operators"] == status
    assert report.agreement.float_operators == "shifted"
    assert (report.verdict == "pass") == (status == "passed")


def test_bit_for_bit_counts_whole_tokens(checkpoint):
    def change(logits):
        logits[3, 5] += 1e-3
        return logits

    runtime = Runtime(lambda: IntegerSession(checkpoint, change, torch.float32), model_probe)
    report = validate(subject_of(checkpoint), runtime)
    assert report.agreement.bit_for_bit == pytest.approx(14 / 15)
    assert report.agreement.float_operators == "torch"
