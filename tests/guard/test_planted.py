"""Regressions planted into bundles of both runtimes: each is caught, and named."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

PLANTED = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ci" / "planted.py"))

NAMED = {
    "nothing": r"PASS  demo-llama",
    "one-step": r"FAIL .*\(identical\)\n(.|\n)*all logits equal at 99\.\d+% of tokens, first other at window",
    "one-code": r"FAIL .*\(identical\)\n(.|\n)*artifact +[0-9a-f]{12} +[0-9a-f]{12}\n",
    "wrong-rows": r"FAIL .*\(top-1, identical\)\n",
    "wrong-layer": r"FAIL .*\(drift, cumulative drift, top-1, KL, identical\)\n(.|\n)*drift +failed +\+4\.\d+% ± 0\.4",
    "tokenizer": r"error: perplexities of different protocols cannot be compared: tokenizer_digest was 6f7bc46f456f",
    "option": r"FAIL .*\(runtime options.*\)\n(.|\n)*session\.x64quantprecision was 1, is 0",
}
"""Regression -> how the check of it begins, or what it says on standard error."""


def test_every_regression_is_caught_and_named(exported: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    run, base = exported
    capfd.readouterr()
    assert PLANTED["main"]([str(run), str(base)]) == 0
    out, err = capfd.readouterr()
    said = dict(re.findall(r"^== (\S+)\n((?:(?!== ).*\n)*)", out, re.MULTILINE))
    assert "NOT CAUGHT" not in said.pop("all")
    assert list(said) == [name for name in NAMED if name != "option" or not (run / "bundle" / "model.pte").exists()]
    for name, text in said.items():
        assert re.match(NAMED[name], err[err.find("error:") :] if name == "tokenizer" else text), name


def test_what_was_not_caught_is_an_exit_code(exported: tuple[Path, Path]) -> None:
    run, base = exported
    assert PLANTED["main"]([str(run), str(base)], {"nothing": (PLANTED["nothing"], 1)}) == 1
