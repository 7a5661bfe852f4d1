"""Activations in files: the same numbers, nothing left behind, and no more of them in memory than is being read."""

from __future__ import annotations

import errno
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afq_export.calibrate.activations import (
    HELD,
    IN_MEMORY,
    SHARE,
    Activations,
    ActivationStore,
    SpilledRows,
    choose_store,
)
from afq_export.calibrate.calibrate import calibrate
from afq_export.calibrate.result import block_path
from afq_export.errors import InputError
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.model import open_model
from afq_export.machine import memory_mb
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import load_recipe, load_target
from tests.calibrate.test_calibrate import windows
from tests.models import write_model

TARGET = load_target("linux-x64-ort")
PARTS = list(torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0)).split(2))
WHOLE = torch.cat(PARTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FloatCheckpoint:
    return open_model(str(write_model(tmp_path_factory.mktemp("model") / "llama", "llama")))


@pytest.fixture(scope="module")
def spilled(tmp_path_factory: pytest.TempPathFactory) -> SpilledRows:
    rows = ActivationStore(tmp_path_factory.mktemp("run")).collect(iter(PARTS), WHOLE.shape)
    assert isinstance(rows, SpilledRows)
    return rows


@given(chosen=st.lists(st.integers(0, 6), min_size=1, max_size=9), size=st.integers(1, 9))
def test_rows_in_a_file_are_the_rows(spilled: SpilledRows, chosen: list[int], size: int) -> None:
    assert (len(spilled), spilled.shape) == (7, WHOLE.shape)
    assert torch.equal(spilled[torch.tensor(chosen)], WHOLE[torch.tensor(chosen)])
    parts, expected = list(spilled.split(size)), WHOLE.split(size)
    assert len(parts) == len(expected) and all(map(torch.equal, parts, expected))


def test_what_was_read_is_a_copy(spilled: SpilledRows) -> None:
    spilled[torch.tensor([1])].zero_()
    next(iter(spilled.split(3))).zero_()
    assert torch.equal(spilled[torch.arange(7)], WHOLE)


def test_a_file_has_no_name(tmp_path: Path) -> None:
    """So nothing has to be removed, also after the process was killed."""
    rows = ActivationStore(tmp_path / "run").collect(iter(PARTS), WHOLE.shape)
    assert list((tmp_path / "run").iterdir()) == []
    assert torch.equal(rows[torch.arange(7)], WHOLE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_resident_is_what_is_read(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()

    part = torch.ones(4, 64, 1024)
    start = resident()
    rows = ActivationStore(tmp_path).collect((part for _ in range(64)), torch.Size((256, 64, 1024)))
    assert all(torch.equal(read, part) for read in rows.split(4))
    assert resident() - start < 16e6, "of 67 MB"


def test_a_full_disk_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"cannot spill activations .*No space left.*--activation-memory-mb"):
        ActivationStore(tmp_path).collect(iter(PARTS), WHOLE.shape)


def test_files_are_taken_beyond_the_budget_only(tmp_path: Path) -> None:
    needed = HELD * 8 * 16 * 32 * 4 / 1e6
    exact, less = (Activations.of(8, 16, 32, budget) for budget in (needed, needed / 2))
    assert exact.needed_mb == needed and not exact.spilled and less.spilled
    assert choose_store(exact, tmp_path) == IN_MEMORY
    assert choose_store(less, tmp_path).folder == tmp_path
    assert Activations.of(8, 16, 32, None).budget_mb == SHARE * memory_mb()
    assert not Activations(1e9, None).spilled


@pytest.mark.parametrize("recipe", ["w4a8-g32", "w8a8-static+rtn", "w4a8-g32+signround"])
def test_files_change_no_byte_of_what_is_learned(model: FloatCheckpoint, tmp_path: Path, recipe: str) -> None:
    changes = ("learning.batch=4", "rounding.steps=2") + (("learning.epochs=2",) if recipe == "w4a8-g32" else ())
    parsed = load_recipe(recipe, changes)
    records = assign(model.config, parsed, TARGET)
    for name, store in (("memory", IN_MEMORY), ("files", ActivationStore(tmp_path / "files"))):
        calibrate(model, parsed, records, windows(), tmp_path / name, 0, silent, store=store)
    names = [block_path(Path(), index).name for index in range(model.config.layers)]
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == names
    for name in names:
        assert (tmp_path / "files" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
