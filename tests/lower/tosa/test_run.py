"""From the command line to a verdict: a tiny copy of the demo model on Ethos-U, every rung equal to the last bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from afq_export.cli import call
from afq_export.spec.report import read_report

TOOLS = ("tosa_serializer", "tosa_reference_model", "ethosu")
missing = [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason="Arm's tosa-tools or Vela are not installed")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "recipe"), [("ethos-u85", "w8a8-static+rtn"), ("ethos-u55", "w4a8-static+rtn")])
def test_a_run_ends_with_equal_bits(target: str, recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["run", "--target", target, "--recipe", recipe, "--tiny", "--windows", "1", "--threads", "1"]
    assert call([*command, "--out", str(out)]) in (0, 1)
    report = read_report((out / "bundle" / "report.json").read_bytes())
    checks = {check.name: check.status for check in report.checks}
    exact = ("rung runtime", "integers", "layers", "decode", "perplexity", "agreement", "disagreements", "fold")
    assert {checks[name] for name in exact} == {"passed"}
    assert report.agreement.bit_for_bit == 1.0 and report.agreement.float_operators == "none"
    assert all(layer.exact for layer in report.layers)
    many, one = report.coverage.estimates
    assert one.tokens == 1 and one.cycles < many.cycles and {**many.outside, **one.outside} == {}
    assert {item.reason for item in report.coverage.refused} == {"on the host: looked up or compared, not computed"}
    assert call(["inspect", str(out / "bundle")]) == 0
    assert call(["generate", str(out / "bundle"), "--prompt", "Once", "--tokens", "3"]) == 0
