"""Whole runs on the demo models, small enough for the suite, and what two of them have in common."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afq_export import pipeline
from afq_export.files import sha256_file
from afq_export.job import resolve
from afq_export.lower.bundle import MANIFEST, REPORTS
from afq_export.pipeline import Outcome
from afq_export.progress import silent
from afq_export.spec.request import Request

SMALL = Request(changes=("samples.windows=4", "samples.length=64"), window=128, eval_windows=2, threads=1)
"""Four short windows to calibrate on, two to evaluate on: what fails, fails on the first tokens."""

STAGES = ("calibration", "quantized", "bundle")


class Runs:
    """Runs that are made when they are first asked for, and once. They must not be changed: see `copy_of`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[Request, Outcome] = {}

    def __call__(self, model: str, recipe: str, **changes: Any) -> Outcome:
        """The finished run of `recipe` on `model`; `changes` replace fields of SMALL."""
        request = dataclasses.replace(SMALL, model=model, recipe=recipe, **changes)
        if request not in self._made:
            self._made[request] = run(request, self._folder / str(len(self._made)))
        return self._made[request]


def run(request: Request, out: Path) -> Outcome:
    """All stages of `request` in this process, into `out`."""
    job = resolve(dataclasses.replace(request, out=str(out)))
    with pipeline.open_folder(job) as folder:
        return pipeline.run(job, folder, silent)


def copy_of(outcome: Outcome, folder: Path) -> Path:
    """A copy of its run folder that a test may change."""
    return Path(shutil.copytree(outcome.folder.path, folder))


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file that the same request must give again: all but the reports, which tell times and sizes.

    The manifest counts without its entries for them.
    """
    found = {}
    for stage in STAGES:
        for path in sorted((folder / stage).iterdir()):
            if path.name not in (MANIFEST, *REPORTS):
                found[f"{stage}/{path.name}"] = sha256_file(path)
    return found | {MANIFEST: json.dumps(manifest_without_reports(folder / "bundle"))}


def manifest_without_reports(bundle: Path) -> Mapping[str, Any]:
    """manifest.json but for the digests of the reports, which must be there."""
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    for name in REPORTS:
        del manifest["files"][name]
    return manifest


def leftovers(folder: Path) -> list[str]:
    """Hidden files below a run folder: what was written and not finished."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".gitignore"]
