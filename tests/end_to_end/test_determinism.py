"""The same request gives the same bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from afq_export.spec.report import Cost, ValidationReport
from tests.end_to_end.runs import SMALL, Runs, digests, leftovers, run

LEARNED = ("samples.windows=4", "samples.length=64", "learning.epochs=1")


@pytest.mark.parametrize(
    ("model", "recipe", "changes"),
    [
        ("demo-llama", "w4a8-g32+awq", SMALL.changes),
        pytest.param("demo-llama", "w4a8-g32+affinequant", LEARNED, marks=pytest.mark.slow),
        pytest.param("demo-opt", "w8a8-static+affinequant", LEARNED, marks=pytest.mark.slow),
    ],
)
def test_twice_the_same_bytes(runs: Runs, tmp_path: Path, model: str, recipe: str, changes: tuple[str, ...]) -> None:
    """Of all files but the reports; those differ in seconds and memory, not in what was measured of the model."""
    first = runs(model, recipe, changes=changes)
    second = run(dataclasses.replace(SMALL, model=model, recipe=recipe, changes=changes), tmp_path / "again")
    one, two = (digests(outcome.folder.path) for outcome in (first, second))
    assert one == two
    assert {
        "bundle/model.pte",
        "bundle/model.bpte",
        "quantized/quant.json",
        "calibration/block-000.safetensors",
    } <= set(one)
    assert not leftovers(second.folder.path)
    assert without_cost(first.report) == without_cost(second.report)


def without_cost(report: ValidationReport) -> ValidationReport:
    """What the model, not the machine, is responsible for."""
    return msgspec.structs.replace(report, cost=Cost())
