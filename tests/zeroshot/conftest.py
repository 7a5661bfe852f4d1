"""Data files of our own in the forms of the sets, and the demo model exported for both runtimes.

What asks lm-eval is not collected where it is not installed; test_library.py says so in one skipped line. Where it is,
it is imported here: it and what it brings warn while they are imported, and here warnings are errors.
"""

from __future__ import annotations

import bz2
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from afq_export.cli import call
from afq_export.errors import MissingToolError
from afq_export.runtime.library import load_runtime, quiet
from afq_export.zeroshot.library import require_lm_eval, silence
from tests.zeroshot.sample import BLANKS, ENDINGS, QUESTIONS

collect_ignore: list[str] = []
try:
    require_lm_eval()
except MissingToolError:
    collect_ignore += ["test_evaluate.py", "test_model.py", "test_sources.py"]
else:
    silence()
    load_runtime()
    with quiet():
        import lm_eval.models.huggingface  # noqa: F401

TARGETS = {"executorch": "android-xnnpack", "onnxruntime": "linux-x64-ort"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for every form."""
    made = tmp_path_factory.mktemp("data")
    for name, records in {**QUESTIONS, "winogrande": BLANKS}.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (made / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(ENDINGS.encode()))
    return made


@pytest.fixture(scope="session", params=sorted(TARGETS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose bundle is not validated."""
    made = tmp_path_factory.mktemp(request.param) / "run"
    recipe = ["--model", "demo-llama", "--recipe", "w8a8-dynamic+rtn", "--threads", "1"]
    assert call(["lower", "--target", TARGETS[request.param], *recipe, "--out", str(made)]) == 0
    return made


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `evaluate` with arguments that must be refused, and returns the one line without its `error: `."""

    def run(*arguments: str, code: int = 2) -> str:
        capfd.readouterr()
        assert call(["evaluate", *arguments]) == code
        out, err = capfd.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run
