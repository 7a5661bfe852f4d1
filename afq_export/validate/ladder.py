"""The validate stage: every rung on the same token ids, every linear in the real runtime, one report with a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from afq_export.errors import MissingToolError
from afq_export.load.checkpoint import DecoderWeights
from afq_export.load.corpus import Windows
from afq_export.progress import Progress, silent
from afq_export.quantize.cache import cache_facts
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec import report as spec
from afq_export.spec.history import History, Tuning
from afq_export.spec.online import OnlineCost
from afq_export.spec.report import Check, ValidationReport
from afq_export.spec.target import TargetProfile
from afq_export.validate.departures import NEAR_TIE, explain_disagreements
from afq_export.validate.evaluate import BROKEN, Measurement, measure
from afq_export.validate.fold_check import TOLERANCE, FoldCheck, measure_fold
from afq_export.validate.layers import Probe, check_layers
from afq_export.validate.rungs import (
    ComparedParts,
    FloatParts,
    FloatRung,
    QuantizedRung,
    Rung,
    TorchParts,
    fake_quant_rung,
    integer_rung,
)
from afq_export.validate.single_steps import with_reasons

if TYPE_CHECKING:
    from afq_export.runtime.session import Session

NEEDED = ("rung integer", "rung runtime", "reference", "layers", "perplexity", "agreement", "disagreements")
"""Checks without which there is no `pass`: a skipped one fails the verdict. The others may be skipped (a bundle is
validated without its source model), and the report says so."""

COMPILED = ("rung integer", "reference", "integers")
"""The same for a target whose programs nothing here runs: the verdict is `compiled`, never `pass`."""

FLOAT_TOLERANCE = 1e-5
"""Largest difference of a runtime float operator from torch's, over the largest value of the row."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is validated, and what is known about it from earlier stages.

    `original` and `folded` are None when the source model is not at hand; `source_missing` says why.
    """

    checkpoint: QuantizedCheckpoint
    target: TargetProfile
    windows: Windows
    model: spec.Model
    recipe: str
    original: DecoderWeights | None = None
    folded: DecoderWeights | None = None
    source_missing: str = "the source model was not given"
    coverage: spec.Coverage = dataclasses.field(default_factory=spec.Coverage)
    cost: spec.Cost = dataclasses.field(default_factory=spec.Cost)
    artifact: spec.Artifact | None = None
    calibration: tuple[History, ...] = ()
    tuning: Tuning | None = None
    size: spec.Size | None = None
    sites: tuple[spec.Site, ...] = ()
    online: tuple[OnlineCost, ...] = ()


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The real runtime: `open_session` loads the exported file, `probe` runs linears alone. Both may raise
    MissingToolError, which is recorded as a skipped rung.

    `float_parts` gives the runtime's own float operators, run alone: with them the integer reference can be compared
    bit for bit; without them (None) torch computes between the linears, and float32 noise flips a code now and then.
    `more` are checks that only this runtime needs, on tokens int64 [T]. A target that nothing here runs has neither
    session nor, perhaps, probe (None): `absent` says why. `reference` is the integer reference of a program that has no
    float operator; None: the linears' integer models, with float operators between them. `steps`: by how many its
    tensors may be off, 1 where nothing is said (single_steps.py).
    """

    open_session: Callable[[], Session] | None
    probe: Probe | None
    float_parts: Callable[[Session], FloatParts] | None = None
    more: Callable[[Tensor], list[Check]] | None = None
    absent: str = ""
    reference: Callable[[], Rung | Session] | None = None
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Effort:
    """Tokens per linear in the runtime, and windows in float64 for the fold check."""

    layer_tokens: int = 64
    fold_windows: int = 2


def validate(
    subject: Subject, runtime: Runtime, effort: Effort = Effort(), progress: Progress = silent
) -> ValidationReport:
    """Climbs the ladder. A wrong result is a failed check and `verdict` "fail", never an exception."""
    checks: list[Check] = []
    rungs, parts = _rungs(subject, runtime, checks)
    pairs = [("float", name) for name in rungs if "float" in rungs and name != "float"]
    pairs += [("integer", "runtime")] if "runtime" in rungs else []
    measurement = measure(rungs, subject.windows.ids_NT, pairs, progress)
    figures = {name: stats.perplexity for name, stats in measurement.rungs.items()}
    checks += [_rung_check(name, figure) for name, figure in figures.items()]
    if parts:
        checks.append(_parts_check(parts))
    if subject.coverage.lowered:
        checks.append(_integers_check(subject))
    fold = _fold(subject, effort, progress)
    checks.append(_fold_check(fold, subject))
    layers, layer_check = _layers(subject, runtime, effort, progress)
    checks.append(layer_check)
    if runtime.more and ("runtime" in rungs or runtime.open_session is None):
        checks += runtime.more(subject.windows.ids_NT[0])
    disagreements = _disagreements(subject, runtime, measurement, progress)
    checks.append(_reference_check(subject.target, figures["fake_quant"].value, figures["integer"].value))
    bounded = subject.target.bounded({record.kernel for record in subject.checkpoint.records.values()})
    checks += _runtime_checks(bounded, measurement, disagreements)
    agreement = _agreements(measurement)
    ordered = tuple(sorted(checks, key=_order))
    return ValidationReport(
        verdict=verdict(ordered, subject.target),
        model=subject.model,
        recipe=subject.recipe,
        target=subject.target.name,
        protocol=protocol_of(subject.windows),
        perplexity=spec.Perplexities(float_=figures.get("float"), **{k: v for k, v in figures.items() if k != "float"}),
        agreement=spec.AgreementReport(
            top1=agreement["integer", "runtime"].top1 if "runtime" in rungs else None,
            kl=agreement["integer", "runtime"].kl if "runtime" in rungs else None,
            against_float={rung: value for (reference, rung), value in agreement.items() if reference == "float"},
            disagreements=tuple(disagreements),
            float_operators=parts.name if parts else "none" if runtime.reference else TorchParts.name,
            bit_for_bit=_bit_for_bit(measurement),
        ),
        fold=spec.FoldReport(
            max_relative_error_float64=fold.float64 if fold else None,
            max_relative_error_float32=fold.float32 if fold else None,
            first_block=fold.first_block if fold else None,
        ),
        layers=tuple(layers),
        first_departure=next((layer.name for layer in layers if not layer.passed), None),
        coverage=subject.coverage,
        cost=subject.cost,
        artifact=subject.artifact,
        checks=ordered,
        calibration=subject.calibration,
        tuning=subject.tuning,
        size=subject.size,
        sites=subject.sites,
        kv_cache=cache_facts(subject.checkpoint.kv_cache, subject.checkpoint.config, subject.target),
        online=subject.online,
    )


def verdict(checks: tuple[Check, ...], target: TargetProfile | None = None) -> Literal["pass", "compiled", "fail"]:
    """`pass` when nothing failed and everything in NEEDED passed; else `fail`, or `compiled` where the target says that
    nothing here runs its programs and everything in COMPILED passed."""
    passed = {check.name for check in checks if check.status == "passed"}
    if any(check.status == "failed" for check in checks):
        return "fail"
    if passed.issuperset(NEEDED):
        return "pass"
    runs = target is None or target.status == "verified"
    return "compiled" if not runs and passed.issuperset(COMPILED) else "fail"


def protocol_of(windows: Windows) -> spec.Protocol:
    """What the figures were measured on."""
    return spec.Protocol(
        corpus=windows.corpus,
        digest=windows.digest,
        tokenizer_digest=windows.tokenizer_digest,
        window=windows.length,
        stride=windows.stride,
        bos=windows.bos,
        windows=len(windows.ids_NT),
        windows_in_corpus=windows.total,
    )


def _rungs(
    subject: Subject, runtime: Runtime, checks: list[Check]
) -> tuple[dict[str, Rung | Session], ComparedParts | None]:
    """The rungs that can run, in order, and the runtime's float operators; a skipped check for each that cannot."""
    rungs: dict[str, Rung | Session] = {}
    for name, weights in (("float", subject.original), ("folded", subject.folded)):
        if weights is None:
            checks.append(_skipped(f"rung {name}", subject.source_missing))
        else:
            rungs[name] = FloatRung(weights)
    rungs["fake_quant"] = fake_quant_rung(subject.checkpoint)
    checkpoint, target = subject.checkpoint, subject.target
    rungs["integer"] = runtime.reference() if runtime.reference else integer_rung(checkpoint, target)
    if runtime.open_session is None:
        checks.append(_skipped("rung runtime", runtime.absent))
        return rungs, None
    try:
        session = runtime.open_session()
    except MissingToolError as error:
        checks.append(_skipped("rung runtime", str(error)))
        return rungs, None
    if session.context < subject.windows.length:
        reason = f"windows of {subject.windows.length} tokens, the file takes {session.context}"
        checks.append(_skipped("rung runtime", reason))
        return rungs, None
    if runtime.reference:
        return rungs | {"runtime": session}, None
    parts = ComparedParts(runtime.float_parts(session)) if runtime.float_parts else None
    return rungs | {"integer": integer_rung(checkpoint, target, parts=parts), "runtime": session}, parts


def _rung_check(name: str, figure: spec.Perplexity) -> Check:
    detail = f"perplexity {figure.value:.4f} on {figure.tokens} tokens"
    return _check(f"rung {name}", figure.value < BROKEN, detail)


def _parts_check(parts: ComparedParts) -> Check:
    """The runtime's float operators are the functions they should be; their last bits are theirs."""
    detail = f"norms, rotation, nonlinearity and attention of {parts.name} within {parts.error:.1e} of torch's"
    if parts.own:
        detail += f"; the reference takes {len(parts.own)} linears from it too (their sums have no order), see `layers`"
    return _check("float operators", parts.error <= FLOAT_TOLERANCE, detail)


def _reference_check(target: TargetProfile, fake_quant: float, integer: float) -> Check:
    """The integer reference against fake quantization, which shares neither its arithmetic nor the runtime."""
    excess = integer / fake_quant - 1
    return _check(
        "reference",
        abs(excess) <= target.reference_budget,
        f"integer reference {excess:+.3%} of fake-quant in torch, budget {target.reference_budget:.2%}",
    )


def _integers_check(subject: Subject) -> Check:
    """Coverage is read back from the file, and reading refuses other integers than the checkpoint's."""
    found, expected = len(subject.coverage.lowered), len(subject.checkpoint.records)
    detail = f"{found} of {expected} linears read back from the file: codes, scales and biases are the checkpoint's"
    return _check("integers", found == expected, detail)


def _fold(subject: Subject, effort: Effort, progress: Progress) -> FoldCheck | None:
    if subject.original is None or subject.folded is None:
        return None
    return measure_fold(subject.original, subject.folded, subject.windows.ids_NT[: effort.fold_windows], progress)


def _fold_check(fold: FoldCheck | None, subject: Subject) -> Check:
    if fold is None:
        return _skipped("fold", subject.source_missing)
    detail = f"folded = float to {fold.float64:.1e} in float64 (allowed {TOLERANCE:.0e}), {fold.float32:.1e} in float32"
    detail += f"; departs at {fold.first_block}" if fold.first_block else ""
    return Check(name="fold", status="passed" if fold.passed else "failed", detail=detail)


def _layers(
    subject: Subject, runtime: Runtime, effort: Effort, progress: Progress
) -> tuple[list[spec.LayerReport], Check]:
    """Reports of all linears; without the runtime, none and a skipped check."""
    ids_T = subject.windows.ids_NT[0, : effort.layer_tokens]
    if runtime.probe is None:
        return [], _skipped("layers", runtime.absent)
    try:
        layers = check_layers(subject.checkpoint, subject.target, ids_T, runtime.probe, subject.folded, progress)
    except MissingToolError as error:
        return [], _skipped("layers", str(error))
    wrong = [layer.name for layer in layers if not layer.passed]
    exact = sum(bool(layer.exact) for layer in layers)
    detail = f"{exact} of {len(layers)} linears equal the integer model bit for bit on {len(ids_T)} tokens"
    if exact < len(layers) and not wrong:
        worst = max(layer.max_relative_error or 0.0 for layer in layers)
        steps = max(layer.max_steps or 0.0 for layer in layers)
        in_steps = f", {steps:.0f} steps of an output's grid" if subject.target.static_graph else ""
        detail += f", the others within the target's bound (largest error {worst:.1e}{in_steps})"
    if wrong:
        detail += f"; {len(wrong)} depart, first {wrong[0]}"
    return layers, Check(name="layers", status="failed" if wrong else "passed", detail=detail)


def _disagreements(
    subject: Subject, runtime: Runtime, measurement: Measurement, progress: Progress
) -> list[spec.Disagreement]:
    if "runtime" not in measurement.rungs:
        return []
    ids_NT = subject.windows.ids_NT
    found = explain_disagreements(subject.checkpoint, subject.target, ids_NT, measurement, progress)
    reference = runtime.reference() if runtime.reference else None
    if not isinstance(reference, QuantizedRung):
        return found
    return with_reasons(reference, ids_NT, found, runtime.steps)


def _runtime_checks(
    target: TargetProfile, measurement: Measurement, disagreements: list[spec.Disagreement]
) -> list[Check]:
    """Perplexity, agreement and explained disagreements of the exported file against the integer reference."""
    if "runtime" not in measurement.rungs:
        missing = "the exported file did not run"
        return [_skipped(name, missing) for name in ("perplexity", "agreement", "disagreements")]
    runtime, integer = (measurement.rungs[name].perplexity.value for name in ("runtime", "integer"))
    same = float(measurement.pairs["integer", "runtime"].same.double().mean())
    excess = runtime / integer - 1
    counts = {
        reason: sum(item.reason == reason for item in disagreements)
        for reason in ("near_tie", "flipped_step", "unexplained")
    }
    explained = f"{counts['near_tie']} near ties (gap at most {NEAR_TIE:.0e} of the largest logit), "
    explained += f"{counts['flipped_step']} flipped activation steps, {counts['unexplained']} unexplained"
    return [
        _check(
            "perplexity",
            abs(excess) <= target.perplexity_budget,
            f"exported {excess:+.3%} of the integer reference, budget {target.perplexity_budget:.2%}",
        ),
        _check(
            "agreement",
            same >= target.agreement_floor,
            f"exported and integer reference choose the same token at {same:.3%}, floor {target.agreement_floor:.1%}; "
            f"logits equal bit for bit at {_bit_for_bit(measurement):.3%}",
        ),
        _check("disagreements", counts["unexplained"] == 0, f"{len(disagreements)} disagreements: {explained}"),
    ]


def _agreements(measurement: Measurement) -> dict[tuple[str, str], spec.Agreement]:
    return {
        pair: spec.Agreement(
            top1=float(stats.same.double().mean()), kl=float(stats.kl.mean()), tokens=stats.same.numel()
        )
        for pair, stats in measurement.pairs.items()
    }


def _bit_for_bit(measurement: Measurement) -> float | None:
    """Share of tokens whose logits are equal to the last bit in the exported file and the reference."""
    pair = measurement.pairs.get(("integer", "runtime"))
    return None if pair is None else float(pair.equal.double().mean())


def _check(name: str, passed: bool, detail: str) -> Check:
    return Check(name=name, status="passed" if passed else "failed", detail=detail)


def _skipped(name: str, reason: str) -> Check:
    return Check(name=name, status="skipped", detail=reason)


def _order(check: Check) -> int:
    """Rungs in the order of the ladder, then the rest as they come."""
    names = [f"rung {rung}" for rung in spec.RUNGS] + [
        "fold",
        "integers",
        "reference",
        "layers",
        "kernels",
        "decode",
        "operators",
        "specification",
        "saturation",
        "kv cache",
        "ort file",
        "float operators",
        "perplexity",
        "agreement",
        "disagreements",
    ]
    return names.index(check.name)
