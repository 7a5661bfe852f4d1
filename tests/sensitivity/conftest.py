"""Prepared jobs on a small random model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from afq_export.job import Prepared, prepare
from afq_export.spec.request import Request
from tests.models import write_model


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    """`make(model kind, field of a Request=...)`; `recipe_` and `records` replace what was made of the recipe."""
    folders: dict[str, Path] = {}

    def job(kind: str = "llama", recipe_=None, records=None, **asked) -> Prepared:
        if kind not in folders:
            folders[kind] = write_model(tmp_path_factory.mktemp(kind))
        asked = {"recipe": "w4a8-g32+rtn", "changes": ("samples.windows=2", "samples.length=16"), **asked}
        made = prepare(Request(model=str(folders[kind]), threads=1, **asked))
        return made if recipe_ is None else dataclasses.replace(made, recipe=recipe_, records=records)

    return job
