"""Files and folders whole or not at all, whatever goes wrong, and run folders that survive it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from afq_export.errors import InputError
from afq_export.files import FULL, folder_beside, refuse_unwritable, sweep, write_beside, write_json, write_text
from afq_export.runfolder import RunFolder, held, prepare

FACTS = {"weights": "1", "seed": "0"}
CAUSES = {
    "an OSError": OSError(errno.ENOSPC, FULL),
    "as safetensors says it": SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"),
    "as tokenizers says it": Exception(f"{FULL} (os error 28)"),
}


@pytest.fixture(params=list(CAUSES))
def full(request: pytest.FixtureRequest) -> Exception:
    """What a writer raises when the disk is full."""
    return CAUSES[request.param]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_on_a_full_disk(tmp_path: Path, full: Exception) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(InputError) as caught, write_beside(path) as part:
        part.write_text("ne")
        raise full
    assert str(caught.value) == f"cannot write [{path}]: {FULL}; free space or name another folder"
    assert caught.value.exit_code == 2
    assert names(tmp_path) == ["a.json"] and path.read_text() == "old"


def test_a_folder_on_a_full_disk(tmp_path: Path, full: Exception) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(InputError, match=r"cannot write \[.*bundle\]: No space left"), folder_beside(path) as part:
        (part / "new").write_text("ne")
        raise full
    assert names(tmp_path) == ["bundle"] and names(path) == ["old"]


def test_a_bug_is_not_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), write_beside(tmp_path / "a") as part:
        part.write_text("half")
        raise ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"), folder_beside(tmp_path / "b"):
        raise ValueError("a bug")
    assert names(tmp_path) == []


def test_an_error_inside_keeps_its_own_words(tmp_path: Path) -> None:
    """A file in a folder: the line names the file."""
    with pytest.raises(InputError, match="not finite"), folder_beside(tmp_path / "b"):
        raise InputError("not finite")


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with folder_beside(tmp_path / "b") as part:
            (part / text).write_text(text)
    assert names(tmp_path) == ["b"] and names(tmp_path / "b") == ["two"]
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o755


def test_a_tensor_file_appears_under_its_name(tmp_path: Path) -> None:
    with write_beside(tmp_path / "deep" / "a.safetensors") as part:
        save_file({"a": torch.ones(2)}, part)
        assert names(tmp_path / "deep") == [part.name]
    assert names(tmp_path / "deep") == ["a.safetensors"]


def test_sweeping_takes_parts_only(tmp_path: Path) -> None:
    (tmp_path / ".a.json.77.part").write_text("ha")
    (tmp_path / ".bundle.xyz.part").mkdir()
    (tmp_path / ".bundle.xyz.part" / "model.pte").write_text("lf")
    for kept in ("a.json", ".gitignore", "notes.part"):
        (tmp_path / kept).write_text("whole")
    sweep(tmp_path)
    assert names(tmp_path) == [".gitignore", "a.json", "notes.part"]
    sweep(tmp_path / "not there")


@pytest.mark.parametrize("left", [(), (".gitignore",), (".gitignore", ".run.json.12.part"), ("..gitignore.12.part",)])
def test_a_run_that_died_before_its_first_file_left_the_folder_free(tmp_path: Path, left: tuple[str, ...]) -> None:
    for name in left:
        (tmp_path / name).write_text("*\n")
    prepare(tmp_path, FACTS, {}, fresh=False)
    assert names(tmp_path) == [".gitignore", "run.json"]


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    with pytest.raises(InputError, match="the output folder is not empty"):
        prepare(tmp_path, FACTS, {}, fresh=True)
    assert names(tmp_path) == [".gitignore"]


def test_half_written_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """A hidden .part file is ours only by its whole name: other programs call theirs so, too."""
    (tmp_path / ".film.mkv.part").write_text("half")
    (tmp_path / ".run.json.12.part").write_text("{")
    for refusing in (lambda: prepare(tmp_path, FACTS, {}, fresh=True), lambda: held(tmp_path).__enter__()):
        with pytest.raises(InputError, match="the output folder is not empty"):
            refusing()
    assert names(tmp_path) == [".film.mkv.part", ".run.json.12.part"]


def test_going_on_sweeps_and_fresh_removes_only_what_runs_make(tmp_path: Path) -> None:
    folder = prepare(tmp_path, FACTS, {}, fresh=False)
    with folder.stage("calibrate"):
        write_text(folder.calibration / "block-000.safetensors", "whole")
    (folder.calibration / ".block-001.safetensors.9.part").write_text("ha")
    (tmp_path / "notes.txt").write_text("mine")
    again = prepare(tmp_path, FACTS, {"seed": 0}, fresh=False)
    assert names(again.calibration) == ["block-000.safetensors"]
    assert again.cost("calibrate", "seconds") is not None
    fresh = prepare(tmp_path, FACTS | {"seed": "1"}, {}, fresh=True)
    assert names(tmp_path) == [".gitignore", "notes.txt", "run.json"]
    assert fresh.cost("calibrate", "seconds") is None
    assert fresh.read()["fingerprint"]["seed"] == "1"


def test_other_inputs_are_named(tmp_path: Path) -> None:
    prepare(tmp_path, FACTS, {}, fresh=False)
    with pytest.raises(InputError, match=r"seed was 0, is 1.*--fresh"):
        prepare(tmp_path, FACTS | {"seed": "1"}, {}, fresh=False)


def test_a_stopped_stage_has_its_cost_and_says_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full run.json cannot be written either; what the stage says is what counts."""
    folder = prepare(tmp_path, FACTS, {}, fresh=False)
    with pytest.raises(KeyboardInterrupt), folder.stage("calibrate"):
        raise KeyboardInterrupt
    assert RunFolder(tmp_path).cost("calibrate", "peak_rss_mb") > 1

    def no_room(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", no_room)
    with pytest.raises(InputError, match=r"block-003"), folder.stage("calibrate"):
        write_json(tmp_path / "block-003", {})
    monkeypatch.undo()
    assert json.loads((tmp_path / "run.json").read_text())["fingerprint"] == FACTS
    assert names(tmp_path) == [".gitignore", "run.json"]


def test_what_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    """And what can be leaves nothing behind, not even the folders that it will lie in."""
    (tmp_path / "file").write_text("old")
    refuse_unwritable(tmp_path / "a b" / "c" / "new.xml")
    refuse_unwritable(tmp_path / "file")
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "file" / "x", "Not a directory"),
                      (tmp_path / ("n" * 300), "File name too long")):  # fmt: skip
        with pytest.raises(InputError, match=f"cannot write.*{why}"):
            refuse_unwritable(path)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"
