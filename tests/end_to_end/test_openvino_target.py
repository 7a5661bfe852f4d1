"""The demo models through OpenVINO: whole runs, and the commands on what they made."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from afq_export.cli import call
from afq_export.lower.bundle import open_bundle
from afq_export.pipeline import Outcome
from tests.end_to_end.runs import Runs

SCHEMES = ("w4a8-g32", "w8a8-dynamic", "w4a8-g32-all4", "w4a8", "w4a16-g32", "w4a16-g128", "w3a16-g128", "w4a8-g128")
MODELS = ("demo-llama", "demo-opt")
FAST = {("demo-llama", "w4a8-g32"), ("demo-opt", "w8a8-dynamic"), ("demo-llama", "w4a16-g32")}
CASES = [
    pytest.param(model, scheme, marks=() if (model, scheme) in FAST else pytest.mark.slow)
    for model in MODELS
    for scheme in SCHEMES
]


def tiny(runs: Runs, model: str, scheme: str) -> Outcome:
    """The run of a two-block random copy, rounded to nearest."""
    return runs(model, f"{scheme}+rtn", target="intel-openvino", tiny=True, window=64, changes=())


@pytest.mark.parametrize(("model", "scheme"), CASES)
def test_the_file_is_the_integer_reference(runs: Runs, model: str, scheme: str) -> None:
    """Logits to the last bit, whatever the kernels; and linears with one order of additions as well."""
    report = tiny(runs, model, scheme).report
    assert report.verdict == "pass", [check for check in report.checks if check.status != "passed"]
    assert {check.status for check in report.checks} == {"passed"}
    assert {"kernels", "float operators", "integers"} <= {check.name for check in report.checks}
    assert report.agreement.bit_for_bit == report.agreement.top1 == 1
    assert all(layer.exact for layer in report.layers if layer.kernel.endswith("dynamic"))


def test_the_bundle_says_how_it_is_run(runs: Runs) -> None:
    bundle = tiny(runs, "demo-llama", "w4a8-g32").bundle
    assert {"openvino_model.xml", "openvino_model.bin", "openvino_properties.json", "tokenizer.json"} <= set(
        bundle.manifest.files
    )
    options = json.loads((bundle.folder / "openvino_properties.json").read_text(encoding="utf-8"))
    assert options["properties"] == {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
    }
    sizes = [(bundle.folder / name).stat().st_size for name in ("openvino_model.xml", "openvino_model.bin")]
    assert open_bundle(bundle.folder).model_bytes == sum(sizes)


def test_commands_take_the_bundle(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny(runs, "demo-llama", "w4a8-g32").bundle.folder)
    for command in (
        ["inspect", f"{folder}/openvino_model.xml"],
        ["generate", folder, "--prompt", "Once", "--tokens", "3"],
        ["perplexity", folder, "--window", "32", "--windows", "1"],
    ):
        assert call(command) == 0
    said = capsys.readouterr().out
    assert "int8 g32 dynamic" in said and "KV_CACHE_PRECISION=f32" in said and "Once" in said
