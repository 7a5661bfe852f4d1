"""`sensitivity` on a tiny model: what it prints and writes, that `plan` and `run` take it, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from afq_export.cli import call

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def given(model: Path, texts: tuple[str, str]) -> list[str]:
    """The options that `sensitivity`, `plan` and `run` share."""
    return ["--model", str(model), "--calib", texts[0], "--tiny", "--threads", "1"]


def test_the_suggestion_is_a_recipe_of_that_size(given: list[str], texts, tmp_path: Path, capfd):
    plain = ["plan", *given, "--eval", texts[1], "--recipe", "w4a8-g32+rtn", "--json"]
    capfd.readouterr()
    assert call(plain) == 0
    own = json.loads(capfd.readouterr().out)["size"]
    path = tmp_path / "new" / "mixed.toml"
    budget = sum(own.values()) / 1e6 + 0.01
    asked = ["sensitivity", *given, "--recipe", "w4a8-g32+rtn", "--budget-mb", f"{budget:.6f}", "--out", str(path)]
    assert call([*asked, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["own"]["bytes"] == sum(own.values()) and found["budget"] == round(budget * 1e6)
    assert found["suggested"]["bytes"] <= found["budget"]
    assert 0 < found["suggested"]["damage"] < found["own"]["damage"]
    assert found["linears"][0]["name"] == "blocks.0.q_proj" and found["linears"][-1]["name"] == "embed_tokens"
    assert call(["plan", *given, "--eval", texts[1], "--recipe", str(path), "--json"]) == 0
    planned = json.loads(capfd.readouterr().out)
    assert sum(planned["size"].values()) == found["suggested"]["bytes"]
    assert planned["recipe"] == "mixed"
    first = path.read_bytes()
    assert call(asked) == 0
    out = capfd.readouterr()
    assert path.read_bytes() == first
    assert out.out.count("blocks.0.") and "1e-3 nats" in out.out
    assert f"--recipe {path}" in out.err


def test_run_takes_it(given: list[str], texts, tmp_path: Path, capfd):
    """The whole run passes, and its file is as large as was said, but for graph and names."""
    path, out = tmp_path / "mixed.toml", tmp_path / "run"
    capfd.readouterr()
    assert call(["sensitivity", *given, "--recipe", "w4a8-g32+rtn", "--out", str(path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert call(["run", *given, "--eval", texts[1], "--recipe", str(path), "--out", str(out)]) == 0
    assert capfd.readouterr().out.startswith("PASS  ")
    assert (out / "bundle" / "model.pte").stat().st_size == pytest.approx(found["suggested"]["bytes"], rel=0.05)
    kernels = [linear["options"][linear["chosen"]]["kernel"] for linear in found["linears"][:-1]]
    report = json.loads((out / "bundle" / "report.json").read_text())
    assert [layer["kernel"] for layer in report["layers"]] == kernels and len(set(kernels)) > 1


def test_more_than_there_is_to_spend(given: list[str], capfd):
    capfd.readouterr()
    assert call(["sensitivity", *given, "--budget-mb", "1000", "--json"]) == 0
    out = capfd.readouterr()
    found = json.loads(out.out)
    assert f"no program takes more than {found['most'] / 1e6:.2f} MB" in out.err
    assert all(
        line["options"][line["chosen"]]["damage"] == min(o["damage"] for o in line["options"])
        for line in found["linears"]
    )


def test_what_is_refused(refused: Refused, given: list[str], tmp_path: Path):
    line = refused("sensitivity", *given, "--budget-mb", "0.001")
    assert line.startswith("the budget is too small [--budget-mb 0.001]: with the smallest grids of android-xnnpack")
    assert refused("sensitivity", *given, "--budget-mb", "0").startswith("no budget [--budget-mb 0]")
    assert refused("sensitivity", *given, "--budget-mb", "nan").startswith("no budget [--budget-mb nan]")
    line = refused("sensitivity", *given, "--out", str(tmp_path / "recipe"))
    assert line.startswith("a recipe's file ends in .toml")
    keep = ["--keep", "lm_head", "--keep", "embed_tokens"]
    line = refused("sensitivity", *given, "--recipe", "w8a8-static+rtn", *keep)
    assert line.startswith("nothing to choose from [w8a8-static+rtn on android-xnnpack]")
    assert refused("sensitivity", *given, "--keep", "blocks.7.*").startswith("nothing to keep [--keep blocks.7.*]")
    assert list(tmp_path.iterdir()) == []


def test_the_least_that_is_named_is_enough(refused: Refused, given: list[str]):
    line = refused("sensitivity", *given, "--budget-mb", "0.001")
    least = line.split("ask for ")[1].split(" MB")[0]
    assert call(["sensitivity", *given, "--budget-mb", least]) == 0
