"""One list of tested versions: the ranges of pyproject.toml, what CI runs, and the digests of what `doctor` fetches."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from afq_export import doctor
from afq_export.cli import call
from afq_export.device.arm64 import pins
from afq_export.runtime.onnxruntime import INSTALL, older

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    """.ci/matrix.py; it is no package."""
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".ci" / "matrix.py")
    if spec is None or not (ROOT / ".ci").is_dir():
        pytest.skip("a checkout's .ci is not here")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


def test_the_ranges_are_what_was_tested(matrix: ModuleType) -> None:
    """From the lowest to before the next minor version of the newest where releases change results, else major."""
    table = matrix.tomllib.loads(matrix.TABLE.read_text(encoding="utf-8"))
    lowest, newest = table["versions"]["lowest"], table["versions"]["newest"]
    expected = {}
    for package, version in newest.items():
        major, minor, *_ = numbers(version)
        end = f"{major}.{minor + 1}" if package in table["exact"] else f"{major + 1}"
        expected[package] = f">={lowest[package].removesuffix('.0')},<{end}"
    assert doctor.requirements() == expected
    assert set(table["exact"]) <= set(lowest) == set(newest)
    assert all(numbers(lowest[package]) <= numbers(newest[package]) for package in newest)


def test_every_combination_is_in_the_ranges(matrix: ModuleType) -> None:
    ranges = doctor.requirements()
    for versions in matrix.combinations().values():
        assert set(versions) == set(ranges)
        assert [name for name in versions if not doctor.within(versions[name], ranges[name])] == []
    mixed = matrix.combinations()["old-runtimes"]
    assert mixed["onnx"] == matrix.combinations()["lowest"]["onnx"] != matrix.combinations()["newest"]["onnx"]
    assert mixed["transformers"] == matrix.combinations()["newest"]["transformers"]


def test_what_the_tests_are(matrix: ModuleType) -> None:
    assert matrix.tests() and all((ROOT / name).exists() for name in matrix.tests())


def test_the_nightly_workflow_runs_the_script(matrix: ModuleType) -> None:
    yaml = pytest.importorskip("yaml")
    data = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8"))
    assert "schedule" in data[True] and data["permissions"] == {"contents": "read"}
    commands = [step["run"] for job in data["jobs"].values() for step in job["steps"] if "run" in step]
    assert {'python .ci/matrix.py "$NAME"', "python -m pytest -m slow", ".ci/npu"} <= set(commands)
    assert not any("${{" in command for command in commands), "no text runs as a command"
    listed = subprocess.run(
        [sys.executable, matrix.__file__, "--list"], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(listed) == list(matrix.combinations())


def test_pins_are_lines_for_pip(matrix: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main(["--pins", "lowest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "onnx==" + matrix.combinations()["lowest"]["onnx"] in lines
    with pytest.raises(SystemExit):
        matrix.main(["middle"])
    assert "no combination middle; there are lowest, newest, " in capsys.readouterr().err


def test_the_runtime_is_refused_where_the_range_begins(matrix: ModuleType) -> None:
    first = matrix.combinations()["lowest"]["onnxruntime"]
    assert not older(first) and older(f"1.{numbers(first)[1] - 1}.9")
    assert f'"onnxruntime{doctor.requirements()["onnxruntime"]}"' in INSTALL


def test_what_doctor_fetches_has_a_digest_in_every_tested_version(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for versions in matrix.combinations().values():
        monkeypatch.setattr(pins, "version", versions.__getitem__)
        for wheel in pins.read_pins().wheels:
            assert len(wheel.sha256) == 64, f"{wheel.name} {wheel.version}"
            assert not wheel.as_here or wheel.version == versions[wheel.name]


def test_doctor_names_what_was_not_tested(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    there = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "9.1" if name == "onnx" else there(name))
    call(["doctor"])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert f"onnx 9.1 (tested {doctor.requirements()['onnx']})" in line
    assert doctor.diagnose().untested.count("onnx 9.1") == 1
