"""The whole pipeline for a target whose programs nothing here runs: `compiled`, and what was seen of the file said."""

from __future__ import annotations

from pathlib import Path

import pytest

from afq_export import pipeline
from afq_export.backends import backend
from afq_export.commands import describe
from afq_export.errors import MissingToolError, VerdictError
from afq_export.job import resolve
from afq_export.pipeline import Outcome
from afq_export.progress import silent
from afq_export.spec.request import Request


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    out = tmp_path_factory.mktemp("run") / "out"
    request = Request(target="ios-coreml", tiny=True, recipe="w4a16-g32+rtn", out=str(out), threads=1)
    job = resolve(request)
    with pipeline.open_folder(job) as folder:
        return pipeline.run(job, folder, silent)


def test_the_verdict_is_compiled_and_never_pass(outcome: Outcome) -> None:
    status = {check.name: check.status for check in outcome.report.checks}
    assert outcome.report.verdict == "compiled"
    assert {status[name] for name in ("rung integer", "integers", "reference", "specification")} == {"passed"}
    assert {status[name] for name in ("rung runtime", "layers", "perplexity")} == {"skipped"}
    assert outcome.report.perplexity.runtime is None


def test_the_bundle_says_what_it_holds(outcome: Outcome) -> None:
    bundle = outcome.bundle
    assert (bundle.runtime, bundle.backend, bundle.model.name) == ("executorch", "coreml", "model.pte")
    assert {"model.mlpackage/Manifest.json", "model.pte"} <= set(bundle.manifest.files)
    facts = describe.bundle(bundle)
    assert {group.kernel for group in facts.layers} == {"int4", "int8"}


def test_it_cannot_be_run_here(outcome: Outcome) -> None:
    with pytest.raises(MissingToolError, match="it needs macOS or iOS"):
        backend("coreml").open_session(outcome.bundle)


def test_another_file_than_the_checkpoints_is_found(outcome: Outcome, tmp_path: Path) -> None:
    """The package beside the .pte is read on its own: one of the two being right is not enough."""
    target = resolve(Request(target="ios-coreml", tiny=True, recipe="w4a16-g32+rtn")).target
    checkpoint = pipeline.open_checkpoint(outcome.folder.quantized)
    assert backend("coreml").coverage(outcome.bundle, target, checkpoint).lowered
    weights = outcome.bundle.folder / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    kept = weights.read_bytes()
    place = kept.index(checkpoint.linear("lm_head").codes.numpy().tobytes()) + 7
    try:
        weights.write_bytes(kept[:place] + bytes([kept[place] ^ 0x11]) + kept[place + 1 :])
        with pytest.raises(VerdictError, match="not the checkpoint"):
            backend("coreml").coverage(outcome.bundle, target, checkpoint)
    finally:
        weights.write_bytes(kept)
