"""Killed anywhere, started again with the same command: the same bytes as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import digests, leftovers

ROOT = Path(__file__).parents[2]
COMMAND = ["run", "--tiny", "--recipe", "w4a8-g32+affinequant", "--threads", "1", "--seed", "3"]
POINTS = {
    "run.json": [],
    "block-001.safetensors": ["calibration"],
    "quant.json": ["calibration"],
    "quantized": ["calibration"],
    "bundle": ["calibration", "quantized"],
    "report.json": ["calibration", "quantized", "bundle"],
}
"""Before what the process dies -> which stages' results are there then."""
FAST = ("block-001.safetensors", "quantized", "bundle", "report.json")
RANDOM_KILLS = 60


def start(*command: str, out: Path, module: str = "afq_export", **settings: Any) -> subprocess.Popen[bytes]:
    """The command line in a process of its own; `settings` are of the process."""
    arguments = [sys.executable, "-m", module, *command, "--out", str(out)]
    given = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | settings
    return subprocess.Popen(arguments, **given)


def finish(out: Path, **settings: Any) -> None:
    """Runs to the end; the verdict is pass."""
    process = start(*COMMAND, out=out, **settings)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(out)
    return digests(out)


@pytest.mark.parametrize("points", [FAST, pytest.param(tuple(POINTS), marks=pytest.mark.slow)], ids=["a few", "all"])
def test_killed_in_every_stage(undisturbed: dict[str, str], tmp_path: Path, points: tuple[str, ...]) -> None:
    """One after another in the same folder: every start goes on where the last one died."""
    out = tmp_path / "run"
    for point in points:
        process = start(point, *COMMAND, out=out, module="tests.end_to_end.stopped")
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said.decode()
        assert sorted(path.name for path in out.iterdir() if path.is_dir() and path.name[0] != ".") == sorted(
            POINTS[point]
        )
        assert leftovers(out), "a kill in the middle of a write leaves its part"
    finish(out)
    assert digests(out) == undisturbed
    assert not leftovers(out)


def test_the_same_bytes_wherever_it_runs(undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Another language, time zone, home, working folder, umask, order of hashes (half of them that no machine has), and
    a clock that jumps."""
    home = tmp_path / "home"
    home.mkdir()
    odd = {
        "LC_ALL": "tr_TR.UTF-8",
        "LANG": "xx_XX",
        "TZ": "Pacific/Kiritimati",
        "HOME": str(home),
        "PYTHONHASHSEED": "77",
    }
    clock = Path(__file__).with_name("jumping_clock")
    odd |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{clock}", "PYTHONUTF8": "0", "COLUMNS": "20", "SOURCE_DATE_EPOCH": "1"}
    finish(tmp_path / "run", cwd=tmp_path, env={**os.environ, **odd}, umask=0o077)
    assert digests(tmp_path / "run") == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_killed_at_random_moments(undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Sixty kills from outside, whenever they come; a run that gets through before its kill is compared, too."""
    chosen, number = random.Random(RANDOM_KILLS), 0
    for _ in range(RANDOM_KILLS):
        process = start(*COMMAND, out=tmp_path / str(number))
        try:
            process.communicate(timeout=chosen.uniform(1, 15))
            assert process.returncode == 0
            assert digests(tmp_path / str(number)) == undisturbed
            number += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    finish(tmp_path / str(number))
    assert digests(tmp_path / str(number)) == undisturbed
    assert not leftovers(tmp_path / str(number))
