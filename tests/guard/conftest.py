"""Bundles of the demo model for both runtimes, and a baseline of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from afq_export.cli import call

EXPORT = ["--model", "demo-llama", "--recipe", "w8a8-dynamic+rtn", "--threads", "1"]
TARGETS = {"executorch": "android-xnnpack", "onnxruntime": "linux-x64-ort"}


@pytest.fixture(autouse=True)
def _no_workflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's own CI may run in one."""
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "SOURCE_DATE_EPOCH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session", params=sorted(TARGETS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder whose bundle is not validated, and a baseline of all windows of the demo text."""
    folder = tmp_path_factory.mktemp(request.param)
    assert call(["lower", "--target", TARGETS[request.param], *EXPORT, "--out", str(folder / "run")]) == 0
    base = folder / "model.afqb"
    create = ["baseline", "create", str(folder / "run"), "--out", str(base), "--windows", "all", "--threads", "1"]
    assert call(create) == 0
    return folder / "run", base
