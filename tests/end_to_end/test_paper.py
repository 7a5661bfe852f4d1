"""examples/paper: what it runs, what it measures, and what its tables say."""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from afq_export.errors import InputError
from afq_export.spec.catalog import data_root, load_recipe
from afq_export.spec.history import EpochRecord, History
from afq_export.spec.report import Perplexity

FOLDER = data_root() / "examples" / "paper"
FACTS = dict(model="demo-llama", scheme="w4a4")


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """reproduce.py and figures.py; examples are no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("reproduce"), importlib.import_module("figures")


def arguments(out: Path, **given: object) -> argparse.Namespace:
    return argparse.Namespace(out=out, sweep=False, factor=None, method=None, seed=0, set=[], **given)


def test_every_recipe_is_a_recipe(paper: tuple[ModuleType, ModuleType]) -> None:
    reproduce, _ = paper
    for scheme in reproduce.SCHEMES:
        for method, name in reproduce.METHODS.items():
            for setting in reproduce.settings("").values():
                changes = (*setting.samples, *reproduce.LEARNED.get(method, ()), *setting.learning)
                recipe = load_recipe(f"{scheme}+{name}", changes if method in reproduce.LEARNED else setting.samples)
                assert (recipe.learning.epochs > 0) == (method in reproduce.LEARNED)


def test_a_run_is_the_exported_files_figure_and_is_not_done_twice(
    paper: tuple[ModuleType, ModuleType], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reproduce, figures = paper
    setting = reproduce.Setting(
        "demo-llama", None, None, 64, 3, ("samples.windows=2", "samples.length=32"), ("learning.epochs=1",)
    )
    reproduce.float_run("demo-llama", setting, tmp_path)
    for method, factor in (("round-to-nearest", None), ("AffineQuant", 1.0)):
        for _ in range(2):
            reproduce.exported_run("demo-llama", setting, "w4a4", method, factor, arguments(tmp_path))
    assert capfd.readouterr().err.count("w4a4") == 2
    other = arguments(tmp_path)
    other.set = ["samples.windows=3"]
    with pytest.raises(InputError, match="figures of another recipe"):
        reproduce.exported_run("demo-llama", setting, "w4a4", "round-to-nearest", None, other)
    plain, nearest, learned = figures.read(tmp_path)
    assert (plain.method, nearest.method, learned.stability_factor) == ("float", "round-to-nearest", 1.0)
    assert nearest.kernels == ("MatMulInteger", "MatMulInteger-a4")
    assert nearest.perplexity.value == pytest.approx(math.exp(statistics.mean(nearest.window_nll)))
    assert plain.perplexity.value < learned.perplexity.value != nearest.perplexity.value
    assert len(learned.calibration[0].epochs) == 1 and not nearest.calibration[0].epochs
    assert figures.find([plain, nearest, learned], "demo-llama", "w4a4", "AffineQuant") is None, "it is the sweep's"


def test_the_model_that_is_not_named_is_not_the_demo_model(
    paper: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--out", "x", "--model", "SmolLM2-135M"])
    with pytest.raises(SystemExit) as ended:
        paper[0].parse()
    assert ended.value.code == 2 and "--smollm2" in capfd.readouterr().err


def test_results_are_one_row_a_line(paper: tuple[ModuleType, ModuleType]) -> None:
    reproduce, figures = paper
    text = (FOLDER / "results.json").read_text(encoding="utf-8")
    rows = msgspec.json.decode(text, type=list[reproduce.Row])
    assert len(text.splitlines()) == len(rows) + 2
    assert figures.one_a_line(rows) == text


def row(reproduce: ModuleType, method: str, losses: tuple[float, ...], **facts: object) -> object:
    value = Perplexity(value=math.exp(statistics.mean(losses)), stderr=0.1, tokens=100)
    return reproduce.Row(method=method, perplexity=value, window_nll=losses, **(FACTS | facts))


def test_differences_are_paired(paper: tuple[ModuleType, ModuleType]) -> None:
    """A tenth of a nat in every window is sure, however far the windows are apart."""
    reproduce, figures = paper
    rows = [
        row(reproduce, "float", (1.0, 5.0, 3.0), scheme="float"),
        row(reproduce, "OmniQuant", (1.2, 5.2, 3.2)),
        row(reproduce, "AffineQuant", (1.1, 5.1, 3.1001)),
        row(reproduce, "AWQ-style", (1.0, 5.1, 3.6)),
    ]
    table = figures.tables(rows)
    assert "| AffineQuant against OmniQuant | -9.51% ± 0.00%, better |" in table
    assert "| OmniQuant against AWQ-style | -3.28% ± 18.56%, tie |" in table
    assert "| round-to-nearest | - |" in table
    rows[2] = row(reproduce, "AffineQuant", (1.3, 5.3, 3.3001))
    assert "+10.52% ± 0.00%, **worse**" in figures.tables(rows)


def test_the_sweep_says_what_was_caught(paper: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    reproduce, figures = paper
    epochs = tuple(EpochRecord(n, 0.1 / n, 0.5 - 0.2 * n, 2.0, 1.0) for n in (1, 2, 3))
    good = History(0.3, 0.2, 0.1, epochs[:2])
    bad = History(0.3, 0.2, 0.15, epochs, ("stability factor 1: epoch 3: dominance is lost; rolled back, tried again",))
    rows = [
        row(reproduce, "float", (1.0, 2.0), scheme="float"),
        row(reproduce, "OmniQuant", (1.2, 2.2), calibration=(good, good)),
        row(reproduce, "AffineQuant", (1.1, 2.1), calibration=(good, good)),
        row(reproduce, "AffineQuant", (1.1, 2.2), calibration=(good, bad), stability_factor=1.0),
    ]
    assert "| demo-llama | w4a4 | 1 | 5.207 | 1.2500e-01 | -0.100 | 1 of 2 |" in figures.tables(rows)
    for again in ("", "-again"):
        figures.loss_curves(rows, "demo-llama", tmp_path / f"2{again}.svg")
        figures.sweep(rows, tmp_path / f"6{again}.svg")
    for name in ("2", "6"):
        first, second = tmp_path / f"{name}.svg", tmp_path / f"{name}-again.svg"
        assert first.read_bytes() == second.read_bytes() and b"</svg>" in first.read_bytes()
    assert msgspec.json.decode(msgspec.json.encode(rows), type=list[reproduce.Row]) == rows
