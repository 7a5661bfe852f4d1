"""Made-up measurements: tokens with a shared difficulty, and small baselines and reports of them."""

from __future__ import annotations

import numpy as np

from afq_export.guard.tokens import Tokens, steps, to_columns
from afq_export.spec.baseline import Baseline, Drift, Facts, Machine, Speed
from afq_export.spec.guard import CheckReport, Departure, Difference, Gate, Limits
from afq_export.spec.report import Artifact, ManifestModel, Perplexity, Protocol

WINDOWS, PREDICTED, KEPT = 6, 31, 8


def protocol(windows: int = WINDOWS, window: int = PREDICTED + 1, there: int = 50) -> Protocol:
    return Protocol("some-text", "c" * 64, "d" * 64, window, window, False, windows, there)


def facts(**changes: object) -> Facts:
    made = dict(
        model=ManifestModel("demo", "a" * 64),
        recipe="w8a8-dynamic",
        target="linux-x64-ort",
        runtime="onnxruntime",
        artifact=Artifact(1000, "b" * 64, "model.onnx"),
        files={"model.onnx": "b" * 64, "config.json": "e" * 64},
        settings={"graph_optimization_level": "all"},
        versions={"onnxruntime": "1.31.1", "torch": "2.13.0"},
        machine=Machine("x86_64", "some cpu", ("avx2",), 1),
        perplexity=Perplexity(40.0, 1.5, WINDOWS * PREDICTED),
        speed=None,
    )
    return Facts(**(made | changes))


def tokens(seed: int = 0, windows: int = WINDOWS, predicted: int = PREDICTED, vocab: int = 50) -> Tokens:
    """Random logits' tokens."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(windows, predicted, vocab)) * 3
    return of_logits(logits, random.integers(0, vocab, (windows, predicted)))


def of_logits(logits: np.ndarray, targets: np.ndarray) -> Tokens:
    """Tokens of logits float [N, P, V], the way that `record` makes them, in numpy."""
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :KEPT]
    chosen = np.take_along_axis(logs, ids, -1)
    rest = np.log1p(-np.exp(chosen).sum(-1, keepdims=True))
    return Tokens(
        nll=-np.take_along_axis(logs, targets[..., None], -1)[..., 0].astype(np.float32),
        top1=ids[..., 0].astype(np.uint32),
        digest=np.frombuffer(logits.astype(np.float32).tobytes(), "<u4").reshape(logits.shape)[..., 0].copy(),
        ids=ids.astype(np.uint32),
        logs=steps(np.concatenate([chosen, rest], -1)),
    )


def baseline(of: Tokens | None = None, **changes: object) -> Baseline:
    made = dict(created="2026-01-02", protocol=protocol(), facts=facts(), tokens=to_columns(of or tokens()))
    return Baseline(**(made | changes))


def report(**changes: object) -> CheckReport:
    """A failed check, with a letter in its text that XML cannot hold and one that GitHub would end a command at."""
    drift = Drift(0.012, 0.001, 0.0095, 0.0145, 6, 186)
    made = dict(
        verdict="fail",
        bundle="run",
        baseline="model.afqb",
        limits=Limits(),
        protocol=protocol(),
        perplexity=Perplexity(40.48, 1.5, 186),
        baseline_perplexity=Perplexity(40.0, 1.5, 186),
        drift=drift,
        cumulative=drift,
        top1=0.97,
        kl=2e-3,
        identical=0.25,
        first_other=(0, 3),
        speed=None,
        gates=(
            Gate("drift", "failed", "+1.20% ± 0.10%, limit +0.50%"),
            Gate("cumulative drift", "inconclusive", "not enough tokens"),
            Gate("size", "passed", "as it was"),
            Gate("speed", "skipped", "another cpu"),
        ),
        differences=(Difference("option level", "all", None), Difference("file a,", None, "f" * 64)),
        worst=(Departure(2, 7, "once\n", "\x0bupon|", 0.5, 4.25),),
        facts=facts(speed=Speed(100.0, 10.0)),
    )
    return CheckReport(**(made | changes))
