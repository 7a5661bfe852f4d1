"""Without lm-eval, or with another one: exit code 3 and what to install."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from afq_export.errors import MissingToolError
from afq_export.zeroshot import library


def test_lm_eval_is_there() -> None:
    """Else this is what the reader sees of the tests that were left out."""
    try:
        library.require_lm_eval()
    except MissingToolError as error:
        pytest.skip(f"most of tests/zeroshot: {error}")
    assert version("lm_eval") == library.SERIES


ASKED = ("none", "--tasks", "piqa", "--data", "none")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    line = refused(*ASKED, code=3)
    assert "lm-eval" in line and 'pip install "afq-export[eval]"' in line and ">=0.4.13,<0.4.14" in line


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(library, "version", lambda name: "0.4.12")
    assert "0.4.12, not 0.4.13" in refused(*ASKED, code=3)


def test_the_extra_is_what_the_line_says() -> None:
    """pyproject.toml, the message and the followed version."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'eval = ["lm-eval[hf]>={library.SERIES},<0.4.14"]' in text
    assert f">={library.SERIES},<0.4.14" in library.INSTALL
