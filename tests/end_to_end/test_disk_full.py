"""A disk that is full in the middle: one line, exit code 2, nothing half-written, nothing lost, and on it goes."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from afq_export.cli import call
from tests.end_to_end.runs import SMALL, STAGES, Runs, digests, leftovers

RECIPE = "w4a8-g32+awq"
PAGE = 4
"""KiB; a file takes whole ones."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for run.json only; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={6 * PAGE}k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    gc.collect()  # mapped files of what was read there
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, kib: int) -> None:
    """Gives the file system `disk` another size."""
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


def size(folder: Path) -> int:
    """KiB that the files below `folder` take."""
    return sum(-(-path.stat().st_size // 1024 // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


def options(out: Path) -> list[str]:
    """The command line of runs.SMALL with RECIPE, into `out`."""
    changes = [part for change in SMALL.changes for part in ("--set", change)]
    small = ["--window", str(SMALL.window), "--windows", str(SMALL.eval_windows), "--threads", str(SMALL.threads)]
    return ["run", "--model", "demo-llama", "--recipe", RECIPE, "--out", str(out), *small, *changes]


def test_every_stage_stops_and_goes_on(runs: Runs, disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each time the disk has room for half of the next stage's files."""
    model = runs("demo-llama", RECIPE).folder.path
    out, before = disk / "run", 5 * PAGE  # .gitignore, run.json, and run.json once more while it is written
    for done, stage in enumerate(STAGES):
        resize(disk, before + size(model / stage) // 2)
        before += size(model / stage)
        capfd.readouterr()
        assert call(options(out)) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: cannot write [{out / stage}")
        assert error.endswith(f"{os.strerror(28)}; free space or name another folder")
        assert not leftovers(out)
        for earlier in STAGES[:done]:
            assert {path.name for path in (out / earlier).iterdir()} == {p.name for p in (model / earlier).iterdir()}
        if stage == "calibration":
            assert 0 < len(list((out / stage).iterdir())) < len(list((model / stage).iterdir()))
        else:
            assert not (out / stage).exists(), "a folder comes whole or not at all"
    resize(disk, 2 * before)
    assert call(options(out)) == 0
    assert digests(out) == digests(model)


def test_no_room_for_the_first_file(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even run.json: the folder is then still free for the next run."""
    filler, out = disk / "filler", disk / "run"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match=os.strerror(28)):
        while True:
            file.write(bytes(1024 * PAGE))
    for _ in range(2):
        assert one_line(capfd, out).startswith(f"error: cannot write [{out}")
        assert not leftovers(out)
        assert not (out / "run.json").exists()
    filler.unlink()
    assert one_line(capfd, out).startswith(f"error: cannot write [{out / 'calibration'}")


def test_a_disk_that_may_only_be_read(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Root may write anywhere but there."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert one_line(capfd, disk / "run").startswith(f"error: cannot write [{disk / 'run'}")


def one_line(capfd: pytest.CaptureFixture[str], out: Path) -> str:
    """What a run that must fail says last."""
    capfd.readouterr()
    assert call(options(out)) == 2
    return capfd.readouterr().err.splitlines()[-1]
