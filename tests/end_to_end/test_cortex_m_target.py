"""A demo model for Cortex-M55: made, read back, its operators computed; and what does not fit, before any work."""

from __future__ import annotations

import pytest

pytest.importorskip("tosa_serializer", reason="the passes of ExecuTorch's Cortex-M backend need tosa-tools [ethos-u]")

from afq_export.cli import call
from tests.end_to_end.runs import Runs


def test_a_run_ends_compiled(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing here runs the program, and the verdict says so; its linears are CMSIS-NN's arithmetic bit for bit."""
    outcome = runs("demo-llama", "w8a8-static+rtn", target="cortex-m55", tiny=True, window=64, changes=())
    checks = {check.name: check.status for check in outcome.report.checks}
    assert outcome.report.verdict == "compiled" and checks["rung runtime"] == "skipped"
    assert checks["integers"] == checks["layers"] == checks["specification"] == "passed"
    assert all(layer.exact for layer in outcome.report.layers if layer.kernel == "CONV2D-s8")
    assert call(["inspect", str(outcome.bundle.folder)]) == 0
    assert "quantized_conv2d" in capsys.readouterr().out
    assert call(["generate", str(outcome.bundle.folder), "--prompt", "a"]) == 3
    assert "cannot run here" in capsys.readouterr().err


def test_a_context_that_does_not_fit_is_refused_before_any_work(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    own = tmp_path / "board.toml"
    own.write_text('base = "cortex-m55"\nname = "board"\n[cortex_m]\nsram_kb = 256\n', encoding="utf-8")
    assert call(["run", "--target", str(own), "--out", str(tmp_path / "out")]) == 2
    assert "does not fit into the target's SRAM" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
