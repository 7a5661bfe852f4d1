"""The whole command for Qualcomm's HTP: from a float model to a verdict on what the simulator computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afq_export.cli import call
from afq_export.errors import InputError
from afq_export.job import resolve
from afq_export.lower.bundle import open_bundle
from afq_export.spec.request import Request

COMMAND = ["--target", "android-qnn-htp", "--recipe", "w8a16-static+rtn", "--windows", "1", "--threads", "1"]
SHORT = ["--set", "samples.windows=2", "--set", "samples.length=64"]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra [qnn]")
    out = tmp_path_factory.mktemp("htp") / "run"
    assert call(["run", *COMMAND, *SHORT, "--out", str(out)]) == 0
    return out


def test_the_verdict_rests_on_the_simulator(run: Path) -> None:
    report = json.loads((run / "bundle" / "report.json").read_text())
    passed = {check["name"] for check in report["checks"] if check["status"] == "passed"}
    needed = {"rung runtime", "reference", "layers", "kernels", "operators", "perplexity", "agreement", "disagreements"}
    assert report["verdict"] == "pass" and needed <= passed
    assert all(layer["max_steps"] <= 1.01 for layer in report["layers"])


def test_the_bundle_has_contexts_and_the_hosts_tables(run: Path) -> None:
    files = open_bundle(run / "bundle").manifest.files
    expected = {"prefill.onnx", "decode.onnx", "prefill.onnx.data", "host.safetensors", "model.json"}
    expected |= {f"{name}_ctx{end}" for name in ("prefill", "decode") for end in (".onnx", "_qnn.bin")}
    assert expected | {"vectors.safetensors", "target.toml"} <= set(files)


def test_other_commands_take_the_bundle(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(run / "bundle")
    assert call(["generate", bundle, "--prompt", "Once upon a time", "--tokens", "4"]) == 0
    assert call(["perplexity", bundle, "--windows", "1", "--window", "32"]) == 0
    assert call(["inspect", bundle]) == 0
    shown = capsys.readouterr().out
    assert "Once upon a time" in shown and "tokens predicted" in shown and "int16 static" in shown


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w8a8-dynamic", "takes static activations, not dynamic"),
        ("w4a16-g32", "takes static activations, not none"),
        ("w2a16-g64", "takes"),
    ],
)
def test_what_the_htp_cannot_run_is_refused_before_any_work(scheme: str, reason: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra [qnn]")
    with pytest.raises(InputError, match=reason):
        resolve(Request(target="android-qnn-htp", recipe=f"{scheme}+rtn", out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
