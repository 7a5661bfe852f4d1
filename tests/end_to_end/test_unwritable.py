"""Folders that may be read and not written, as a user without root's powers meets them: one line, exit code 2."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from afq_export.cli import call
from afq_export.files import sha256_file
from tests.end_to_end.runs import SMALL, Runs, copy_of, leftovers

OF = ("demo-llama", "w4a8-g32+awq")
"""A run that other tests ask for, too."""
VERSION_3, DAC_OVERRIDE, DAC_READ_SEARCH = 0x20080522, 1, 2
"""Linux' capabilities (linux/capability.h): root reads and writes whatever the mode of a file says by these two."""


@pytest.fixture
def no_powers() -> Iterator[None]:
    """Takes from this thread what lets root write anywhere, and gives it back; nothing where this is not root."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = struct.pack("Ii", VERSION_3, 0), ctypes.create_string_buffer(24)
    if libc.capget(header, before):
        pytest.skip("capabilities cannot be taken from root here")
    effective, *others = struct.unpack("6I", before.raw)
    less = struct.pack("6I", effective & ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH), *others)
    if libc.capset(header, less):
        pytest.skip("capabilities cannot be taken from root here")
    yield
    assert libc.capset(header, before.raw) == 0


@pytest.fixture
def closed(runs: Runs, tmp_path: Path, no_powers: None) -> Iterator[Path]:
    """A folder with a finished run in which nothing may be written, at any depth."""
    folder = tmp_path / "closed"
    copy_of(runs(*OF), folder / "run")
    inside = [folder, *(path for path in folder.rglob("*"))]
    for path in inside:
        path.chmod(path.stat().st_mode & 0o555)
    with pytest.raises(PermissionError):
        (folder / "run" / "probe").touch()
    yield folder
    for path in inside:
        path.chmod(path.stat().st_mode | 0o200)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def options(out: Path) -> list[str]:
    """The command line of `OF`, into `out`."""
    changes = [part for change in SMALL.changes for part in ("--set", change)]
    small = ["--window", str(SMALL.window), "--windows", str(SMALL.eval_windows), "--threads", "1"]
    return ["--model", OF[0], "--recipe", OF[1], "--out", str(out), *small, *changes]


def test_every_command_says_where(closed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, baseline = closed / "run", str(tmp_path / "own.afqb")
    assert call(["baseline", "create", str(run), "--out", baseline]) == 0, "what only reads works"
    before = contents(tmp_path)
    refused = [
        ["run", *options(closed / "new")],
        ["run", *options(run)],
        ["run", *options(run), "--fresh"],
        ["quantize", *options(closed / "new")],
        ["validate", str(run)],
        ["sensitivity", "--model", OF[0], "--out", str(closed / "mixed.toml")],
        ["baseline", "create", str(run), "--out", str(closed / "new.afqb")],
        ["check", str(run), "--baseline", baseline, "--junit", str(closed / "junit.xml")],
        ["report", str(run)],
        ["report", str(run), "--out", str(closed / "page.html")],
    ]
    for command in refused:
        capfd.readouterr()
        assert call(command) == 2, command
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: cannot write [{closed}"), command
        assert f"]: {os.strerror(errno.EACCES)}; " in error, command
    assert contents(tmp_path) == before and not leftovers(closed)
