"""`device` and what else takes --device, on this machine as the device."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from afq_export.cli import call
from afq_export.device.build import NATIVE, find_compiler

Refused = Callable[..., str]

pytestmark = pytest.mark.skipif(find_compiler(NATIVE) is None, reason="needs a C++ compiler for the runner")


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for runners and a folder for what lies on the device."""
    pytest.importorskip("executorch", reason="needs ExecuTorch")
    folder = tmp_path_factory.mktemp("places")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFQ_CACHE", str(folder / "cache"))
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield folder
    tempfile.tempdir = None


def left(places: Path) -> list[str]:
    return sorted(path.name for path in places.iterdir() if path.name.startswith("afq-"))


@pytest.mark.slow
def test_the_same_file_here_and_there(
    capsys: pytest.CaptureFixture[str], finished: Path, texts: tuple[str, str], places: Path
) -> None:
    """Every linear to the last bit, prefill and single steps; nothing stays."""
    options = ["--eval", texts[1], "--windows", "1", "--window", "24", "--json"]
    assert call(["device", "check", str(finished), "--device", "host", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in found["checks"]] == ["linears on host", "on host", "steps on host"]
    assert found["verdict"] == "pass" and found["linears"] and found["protocol"]["window"] == 24
    (device,) = found["devices"]
    assert device["exact_linears"] == device["linears"] > 10 and device["there"]["tokens"] == 23
    assert left(places) == []


def test_a_bundle_that_left_its_run_folder(
    capsys: pytest.CaptureFixture[str], finished: Path, texts: tuple[str, str], tmp_path: Path, places: Path
) -> None:
    (tmp_path / "shipped").mkdir()
    for path in (finished / "bundle").iterdir():
        (tmp_path / "shipped" / path.name).write_bytes(path.read_bytes())
    options = ["--eval", texts[1], "--windows", "1", "--window", "24", "--device", "host"]
    assert call(["device", "check", str(tmp_path / "shipped"), *options]) == 0
    assert "linears were not run alone" in capsys.readouterr().out and left(places) == []
    assert call(["device", "check", str(tmp_path / "shipped"), *options, "--keep"]) == 0
    (kept,) = left(places)
    assert f"left on host: {places / kept}" in capsys.readouterr().out
    assert (places / kept / "model.pte").is_file()
    shutil.rmtree(places / kept)


@pytest.mark.slow
def test_times(capfd: pytest.CaptureFixture[str], finished: Path, refused: Refused) -> None:
    given = ["device", "bench", str(finished), "--device", "host", "--prompt-tokens", "8", "--tokens", "4"]
    assert call([*given, "--repetitions", "2", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    for name in ("load", "prefill", "decode", "memory"):
        assert 0 < found[name]["low"] <= found[name]["median"] <= found[name]["high"]
    assert (found["emulated"], found["claim"], found["repetitions"]) == (False, "", 2)
    assert call([*given, "--repetitions", "1"]) == 0
    assert "claim" not in capfd.readouterr().out
    said = refused("device", "bench", str(finished), "--device", "host", "--tokens", "100000")
    assert said.startswith("the tokens do not fit: 64 and 100000")


@pytest.mark.slow
def test_a_baseline_is_held_on_a_device(
    capsys: pytest.CaptureFixture[str], finished: Path, texts: tuple[str, str], tmp_path: Path, places: Path
) -> None:
    file = str(tmp_path / "x.afqb")
    given = ["--eval", texts[1]]
    assert call(["baseline", "create", str(finished), "--out", file, *given, "--window", "32", "--windows", "8"]) == 0
    capsys.readouterr()
    assert call(["check", str(finished), "--baseline", file, *given, "--device", "host", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "host" and found["top1"] == 1.0 and found["verdict"] == "pass"
    assert found["facts"]["versions"]["executorch"].endswith(" in pte_runner")
    assert "identical" not in {gate["name"] for gate in found["gates"]}  # other float kernels: not promised
    assert left(places) == []


@pytest.mark.slow
def test_a_baseline_that_was_made_on_the_device_has_its_speed_and_its_bits(
    capsys: pytest.CaptureFixture[str], finished: Path, texts: tuple[str, str], tmp_path: Path, places: Path
) -> None:
    """Of this machine's neither can be held there: the runner is another program."""
    file, there = str(tmp_path / "x.afqb"), ["--eval", texts[1], "--device", "host"]
    short = ["--window", "32", "--windows", "4", "--speed"]
    assert call(["baseline", "create", str(finished), "--out", file, *there, *short]) == 0
    said = ["--who", "Ada", "--what", "nothing", "--why", "to see"]
    assert call(["baseline", "update", str(finished), "--baseline", file, *there, *said]) == 0
    capsys.readouterr()
    assert call(["check", str(finished), "--baseline", file, *there, "--slowdown", "0.9", "--json"]) == 0
    gates = {gate["name"]: gate["status"] for gate in json.loads(capsys.readouterr().out)["gates"]}
    assert gates["speed"] == gates["identical"] == "passed"
    assert left(places) == []


@pytest.mark.slow
def test_validate_runs_it_there_too(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    given = ["--device", "host", "--device-windows", "1", "--device-window", "24", "--threads", "1", "--json"]
    code = call(["validate", str(finished), *given])
    report = json.loads(capsys.readouterr().out)
    assert code == (report["verdict"] == "fail")
    assert [device["device"] for device in report["devices"]] == ["host"]
    named = {check["name"]: check["status"] for check in report["checks"]}
    assert named["linears on host"] == named["on host"] == named["steps on host"] == "passed"


def test_a_runner_for_another_machine(refused: Refused, finished: Path, tmp_path: Path, places: Path) -> None:
    runner = tmp_path / "runner"
    runner.write_bytes(b"\x7fELF" + bytes(14) + b"\xf3\x00")
    said = refused("device", "check", str(finished), "--device", "host", "--runner", str(runner))
    assert said.startswith("the runner is for another machine [") and "it is for riscv64" in said
    assert left(places) == []
