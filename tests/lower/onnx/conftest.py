"""Shared by the tests of this folder: bundles of the demo models for ONNX Runtime, with a calibration that is as short
as can be, and random decoders of every kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from afq_export.cli import call
from afq_export.lower.bundle import Bundle, open_bundle
from tests.lower.onnx.decoders import Decoders

SHORT = ["--set", "samples.windows=2", "--set", "samples.length=64", "--threads", "1"]


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """The bundle of a model, a scheme (rounded to nearest) and a target: made once, never to be changed."""
    made: dict[tuple[str, str, str], Bundle] = {}

    def bundle(model: str, scheme: str, target: str = "linux-x64-ort") -> Bundle:
        key = model, scheme, target
        if key not in made:
            out = tmp_path_factory.mktemp("lowered") / "run"
            command = ["lower", "--target", target, "--model", model, "--recipe", f"{scheme}+rtn", "--out", str(out)]
            assert call([*command, *SHORT]) == 0
            made[key] = open_bundle(out / "bundle")
        return made[key]

    return bundle


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    """Random decoders by the name of their case."""
    return Decoders(tmp_path_factory.mktemp("decoders"))
