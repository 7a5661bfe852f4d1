"""Learned rotations and online Hadamard matrices in whole runs: the file is its reference to the bit, and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afq_export.calibrate.result import block_path, rotation_path
from afq_export.job import resolve
from afq_export.pipeline import Outcome
from afq_export.plan import program_size
from afq_export.quantize.checkpoint import open_checkpoint
from tests.end_to_end.runs import Runs, copy_of, digests, run

LEARNED = ("transforms.rotation=learned", "transforms.rotation_steps=4")
ONLINE = ('transforms.online=["down_hadamard"]',)


def tiny(runs: Runs, target: str, model: str, changes: tuple[str, ...], scheme: str = "w4a8-g32") -> Outcome:
    return runs(model, f"{scheme}+rtn", target=target, tiny=True, window=64, changes=changes)


@pytest.mark.parametrize(
    ("target", "model", "scheme"),
    [
        ("android-xnnpack", "demo-llama", "w4a8-g32"),
        ("android-xnnpack", "demo-opt", "w8a8-dynamic"),
        ("linux-x64-ort", "demo-opt", "w4a8-g32"),
        ("android-ort", "demo-llama", "w8a8-static"),
    ],
)
def test_with_both_the_file_is_the_integer_reference(runs: Runs, target: str, model: str, scheme: str) -> None:
    outcome = tiny(runs, target, model, LEARNED + ONLINE, scheme)
    report = outcome.report
    assert report.verdict == "pass", [check for check in report.checks if check.status != "passed"]
    assert report.agreement.bit_for_bit == 1
    assert report.fold.max_relative_error_float64 < 1e-9
    assert rotation_path(outcome.folder.calibration).exists()
    size = open_checkpoint(outcome.folder.quantized).config.down_hadamard
    (cost,) = report.online
    assert cost.size == size > 1 and cost.macs > 0
    text = (outcome.bundle.folder / "report.md").read_text(encoding="utf-8")
    assert "not folded, in the program: down_hadamard" in text
    assert f"{cost.share:.1%}" in text


def test_a_matrix_behind_every_norm_stays_in_the_file(runs: Runs) -> None:
    more = ("transforms.norm_to_linears=affine", "samples.windows=8", "learning.epochs=2")
    changes = ('transforms.online=["norm_matrix"]', *more)
    outcome = runs("demo-opt", "w4a4+affinequant", target="linux-x64-ort", tiny=True, window=64, changes=changes)
    report = outcome.report
    assert report.verdict == "pass", [check for check in report.checks if check.status != "passed"]
    assert report.agreement.bit_for_bit == 1
    assert report.fold.max_relative_error_float64 < 1e-9
    floats = [open_checkpoint(outcome.folder.quantized).block_floats(index) for index in range(2)]
    found = [of_block[f"{norm}.matrix"] for of_block in floats for norm in ("attn_norm", "mlp_norm")]
    assert any(float(matrix.triu(1).abs().max()) > 1e-3 for matrix in found), "diagonals would have folded"
    (cost,) = report.online
    assert cost.name == "norm_matrix" and cost.bytes == sum(4 * matrix.numel() for matrix in found)
    refused = {item.what: item.count for item in report.coverage.refused}
    assert refused["MatMul by a matrix behind a norm"] == len(found) == 4
    assert "not folded, in the program: norm_matrix" in (outcome.bundle.folder / "report.md").read_text("utf-8")
    planned = program_size(resolve(_request(outcome)))
    assert planned.total == pytest.approx(outcome.bundle.model_bytes, rel=0.02)
    assert cost.bytes > 0.1 * planned.total, "what was forgotten would show"


def test_without_there_is_no_such_matrix(runs: Runs) -> None:
    outcome = tiny(runs, "linux-x64-ort", "demo-opt", ())
    assert outcome.report.online == ()
    names = {refused.what for refused in outcome.report.coverage.refused}
    assert not any("Hadamard" in name for name in names)


def test_a_run_that_lost_its_last_block_ends_in_the_same_bytes(runs: Runs, tmp_path: Path) -> None:
    """The rotation is a result of calibration: it is not learned again, and what follows is what was."""
    first = tiny(runs, "android-xnnpack", "demo-llama", LEARNED + ONLINE)
    folder = copy_of(first, tmp_path / "again")
    again = rotation_path(folder / "calibration")
    stood = again.stat().st_mtime_ns
    for path in (block_path(folder / "calibration", 1), *(folder / "quantized").iterdir(), *_files(folder / "bundle")):
        path.unlink()
    request = json.loads((folder / "run.json").read_text())["request"]
    assert request["recipe"] == "w4a8-g32+rtn"
    job = resolve(_request(first))
    run(job.request, folder)
    assert again.stat().st_mtime_ns == stood
    assert digests(folder) == digests(first.folder.path)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _request(outcome: Outcome):
    from afq_export.spec.request import recorded_request

    return recorded_request(outcome.folder.read()["request"])
