"""From a trained model to a file in its real runtime: both families, every scheme, and nothing taken on trust."""

from __future__ import annotations

import pytest

from afq_export.errors import InputError
from afq_export.pipeline import Outcome
from afq_export.quantize.assign import assign
from afq_export.quantize.checkpoint import open_checkpoint
from afq_export.spec.catalog import SCHEMES, entries, load_recipe, load_target
from tests.checkpoints import small_config
from tests.end_to_end.runs import Runs
from tests.validate.test_xnnpack_runtime import runs_avx512_vnni

TARGET = load_target("android-xnnpack")
MODELS = ("demo-llama", "demo-opt")
FAST = {
    ("demo-llama", "w8a8-dynamic"): "rtn",
    ("demo-opt", "w8a8-static"): "smoothquant",
    ("demo-opt", "w4a8"): "awq",
    ("demo-llama", "w4a8-g32"): "awq",
    ("demo-llama", "w4a8-g128"): "rptq",
    ("demo-opt", "w4a8-g32-all4"): "rtn",
    ("demo-llama", "w4a8-static"): "rtn",
}
"""One model a scheme, so that the suite stays short; the method is any that is cheap."""
WEIGHT_ONLY = {"w2a16-g64", "w3a16-g128", "w4a16-g32", "w4a16-g128", "w4a16-g32-all4", "w3a16", "w4a16"}
INPUTS_OF_4 = {"w4a4"}
STATIC_16 = {"w8a16-static", "w4a16-static", "w4a16-static-g32"}
"""Schemes that XNNPACK has no kernel for: other targets run them (test_onnx_targets.py, test_qnn.py)."""
TAKEN = sorted({entry.name for entry in entries(SCHEMES)} - WEIGHT_ONLY - STATIC_16 - INPUTS_OF_4)
CASES = [
    pytest.param(
        model, f"{scheme}+{FAST.get((model, scheme), 'awq')}", marks=() if (model, scheme) in FAST else pytest.mark.slow
    )
    for scheme in TAKEN
    for model in MODELS
]


def test_the_suite_has_every_scheme() -> None:
    assert {scheme for _, scheme in FAST} == set(TAKEN)
    assert {model for model, _ in FAST} == set(MODELS)


@pytest.mark.parametrize("scheme", sorted(WEIGHT_ONLY | STATIC_16 | INPUTS_OF_4))
def test_what_is_left_out_is_what_is_refused(scheme: str) -> None:
    with pytest.raises(InputError, match=r"takes (dynamic activations, not (none|static)|8-bit activations, not 4)"):
        assign(small_config(), load_recipe(scheme), TARGET)


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_the_file_is_the_integer_reference(runs: Runs, model: str, recipe: str) -> None:
    outcome = runs(model, recipe)
    report = outcome.report
    assert report.verdict == "pass", [check for check in report.checks if check.status != "passed"]
    assert {check.status for check in report.checks} == {"passed"}
    assert report.agreement.top1 == 1
    assert not report.agreement.disagreements
    if bits_are_promised(outcome):
        assert report.agreement.bit_for_bit == 1
    assert report.perplexity.runtime.value == pytest.approx(report.perplexity.integer.value, rel=1e-5)
    assert report.fold.max_relative_error_float64 < 1e-9


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_every_linear_runs_as_its_kernel_promises(runs: Runs, model: str, recipe: str) -> None:
    layers = runs(model, recipe).report.layers
    assert all(layer.passed for layer in layers)
    inexact = [layer for layer in layers if not layer.exact]
    assert all(TARGET.kernel(layer.kernel).max_relative_error > 0 for layer in inexact)
    assert not inexact or not runs_avx512_vnni()
    assert all(layer.sqnr_db > 6 for layer in layers), "a layer whose noise is half its signal is broken"


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_everything_is_lowered_or_named(runs: Runs, model: str, recipe: str) -> None:
    outcome = runs(model, recipe)
    records = open_checkpoint(outcome.folder.quantized).records
    coverage = outcome.report.coverage
    assert [(line.name, line.kernel) for line in coverage.lowered] == [(n, r.kernel) for n, r in records.items()]
    assert [layer.name for layer in outcome.report.layers] == list(records)
    assert coverage.refused and all(line.reason and line.count > 0 for line in coverage.refused)


def bits_are_promised(outcome: Outcome) -> bool:
    """Whether every kernel of the run is exact to the last bit on this machine."""
    kernels = {layer.kernel for layer in outcome.report.layers}
    return runs_avx512_vnni() or not any(TARGET.kernel(name).max_relative_error for name in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_what_is_learned_is_better_than_rounding(runs: Runs, model: str) -> None:
    """Two epochs on little text: enough that the 4-bit file comes nearer to the float model."""
    changes = ("samples.windows=16", "samples.length=128", "learning.epochs=2")
    learned = runs(model, "w4a8+affinequant", changes=changes, eval_windows=8).report
    rounded = runs(model, "w4a8+rtn", changes=changes[:2], eval_windows=8).report
    assert learned.verdict == rounded.verdict == "pass"
    assert learned.agreement.against_float["runtime"].kl < rounded.agreement.against_float["runtime"].kl
