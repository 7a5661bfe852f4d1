"""How an error leaves the program: one line, an exit code, and JSON when asked for."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable

import pytest

from afq_export import pipeline
from afq_export.cli import call
from afq_export.runfolder import held


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Lets the first stage of every run raise `error`."""

    def stage(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run_calibrate", stage)


@pytest.fixture
def command(asked: list[str], tmp_path) -> list[str]:
    return ["run", *asked, "--recipe", "w4a8+rtn", "--out", str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped; the same command continues where it stopped"),
        (ValueError("broken\nhere"), 70, "internal error: ValueError: broken here (run with --debug for the trace"),
        (MemoryError(), 2, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "error: out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "error: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: cannot read or write [/x]: Permission"),
    ],
)
def test_what_a_stage_raises(command, monkeypatch, capfd, error: BaseException, code: int, said: str):
    raising(monkeypatch, error)
    assert call(command) == code
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(said)


def test_debug_shows_the_traceback_wherever_it_stands(command, monkeypatch, capfd):
    raising(monkeypatch, ValueError("broken"))
    assert call([*command, "--debug"]) == 70
    assert "Traceback" in capfd.readouterr().err


def test_json_errors_are_one_document(command, monkeypatch, capfd):
    raising(monkeypatch, ValueError("broken"))
    assert call([*command, "--json"]) == 70
    error = json.loads(capfd.readouterr().out)["error"]
    assert error == {"what": "internal error", "why": "ValueError: broken", "exit_code": 70}
    assert call(["recipes", "show", "w4a9", "--json"]) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["what"] == "no such recipe" and error["where"] == "w4a9" and error["exit_code"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--modell", "x"], "No such option: --modell"),
        (["generate", "x"], "Missing option '--prompt'"),
        (["targets"], "Missing command"),
        (["rnu"], "No such command 'rnu'"),
        (["run", "--seed", "x"], "Invalid value for '--seed'"),
        (["run", "--windows", "0"], "cannot read --windows [0]"),
    ],
)
def test_usage_errors_are_one_line_too(refused: Callable[..., str], arguments: list[str], said: str):
    assert refused(*arguments).startswith(said)


@pytest.mark.parametrize("name", ["run", "calibrate", "quantize", "lower"])
def test_two_runs_in_one_folder(command, refused, tmp_path, name: str):
    with held(tmp_path / "run"):
        said = refused(name, *command[1:])
    assert said.startswith(f"another run is in this folder [{tmp_path / 'run'}]: process ")
    assert said.endswith("wait for it, or work in another folder")
