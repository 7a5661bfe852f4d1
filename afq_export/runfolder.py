"""The run folder: what was asked, with which inputs, and what each stage has cost so far.

run.json       fingerprint of the inputs, the request, seconds and peak memory by stage
run.lock       which process works in the folder now
calibration/   one file per block          quantized/   the quantized checkpoint          bundle/   what ships
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from afq_export.errors import InputError
from afq_export.files import sweep, write_json, write_text
from afq_export.lock import hold
from afq_export.machine import give_back_memory, peak_rss_mb
from afq_export.spec.strict import Data

IGNORE_ALL = "*\n"
"""The run folder's .gitignore: what is made there is not for a repository."""

LOCK = "run.lock"

FIRST_PARTS = re.compile(r"\.(\.gitignore|run\.json)\.\d+\.part")
"""What a run that was killed in its first moment leaves half-written (see `write_beside`)."""

SHOWN = 3
"""Differences between two fingerprints that an error names."""


class StageCost(Data):
    """What a stage took over all its attempts."""

    seconds: float
    peak_rss_mb: float


class RunFile(Data):
    """run.json."""

    fingerprint: dict[str, str]
    request: dict[str, Any]
    cost: dict[str, StageCost]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A folder that belongs to one fingerprint."""

    path: Path

    @property
    def calibration(self) -> Path:
        return self.path / "calibration"

    @property
    def quantized(self) -> Path:
        return self.path / "quantized"

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    def read(self) -> dict[str, Any]:
        """The content of run.json. Raises InputError when it is not there or broken."""
        path = self.path / "run.json"
        try:
            return msgspec.to_builtins(msgspec.json.decode(path.read_bytes(), type=RunFile))
        except OSError as error:
            raise InputError("not a run folder", where=str(self.path), why="there is no run.json") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError("run.json is broken", where=str(path), why=str(error)) from error

    def cost(self, stage: str, field: str) -> float | None:
        """`seconds` or `peak_rss_mb` of a stage over all attempts, None when it has not run."""
        return self.read()["cost"].get(stage, {}).get(field)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the body's seconds, and this process' peak memory, to the stage's cost; also when it is interrupted."""
        start = time.monotonic()
        try:
            yield
        except BaseException:
            with contextlib.suppress(InputError):  # on a full disk, what the body says is what counts
                self._add_cost(name, time.monotonic() - start)
            raise
        self._add_cost(name, time.monotonic() - start)
        give_back_memory()

    def _add_cost(self, stage: str, seconds: float) -> None:
        data = self.read()
        old = data["cost"].get(stage, {"seconds": 0.0, "peak_rss_mb": 0.0})
        data["cost"][stage] = {
            "seconds": round(old["seconds"] + seconds, 2),
            "peak_rss_mb": max(old["peak_rss_mb"], peak_rss_mb()),
        }
        write_json(self.path / "run.json", data)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """The folder `path` for this process alone. Raises InputError when another has it, or it is someone else's."""
    if not (path / "run.json").exists():
        _refuse_other_content(path)
        write_text(path / ".gitignore", IGNORE_ALL)
    with hold(path / LOCK):
        yield


def prepare(path: Path, fingerprint: dict[str, str], request: dict[str, Any], fresh: bool) -> RunFolder:
    """The run folder at `path` for these inputs: a new one, or one with the same fingerprint to go on with.

    What a killed process left half-written is removed, and with `fresh` what an earlier run made; nothing else ever is.
    Raises InputError when the folder holds something else, naming what differs.
    """
    folder = RunFolder(path)
    if not (path / "run.json").exists():
        _refuse_other_content(path)
        sweep(path)
        write_text(path / ".gitignore", IGNORE_ALL)
        write_json(path / "run.json", _new(fingerprint, request))
        return folder
    for place in (path, folder.calibration, folder.bundle):
        sweep(place)
    if fresh:
        for made in (folder.bundle, folder.quantized, folder.calibration):
            if made.exists():
                shutil.rmtree(made)
        write_json(path / "run.json", _new(fingerprint, request))
        return folder
    data = folder.read()
    refuse_difference(data.get("fingerprint", {}), fingerprint, path)
    write_json(path / "run.json", data | {"request": request})
    return folder


def _new(fingerprint: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
    """run.json before the first stage."""
    return {"fingerprint": fingerprint, "request": request, "cost": {}}


def _refuse_other_content(path: Path) -> None:
    """Raises InputError unless `path` is free: not there, empty, or left by a run stopped in its first moment.

    Removes nothing: the folder may be someone else's, or of a run that starts just now.
    """
    if not path.exists():
        return
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not FIRST_PARTS.fullmatch(entry.name)]
        left = {entry.name: entry for entry in entries if entry.name != LOCK}
        if not left or (left.keys() == {".gitignore"} and left[".gitignore"].read_bytes() == IGNORE_ALL.encode()):
            return
    raise InputError(
        "the output folder is not empty",
        where=str(path),
        why="it holds no run of this program",
        do="name another folder with --out",
    )


def refuse_difference(old: dict[str, str], new: dict[str, str], path: Path) -> None:
    """Raises InputError naming the first few facts that differ."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if not keys:
        return
    shown = [f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in keys[:SHOWN]]
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    raise InputError(
        "the output folder holds a run with other inputs",
        where=str(path),
        why="; ".join(shown) + more,
        do="name another folder with --out, or start over with --fresh",
    )


def _short(value: str | None) -> str:
    return "absent" if value is None else value if len(value) <= 24 else value[:12] + "..."
