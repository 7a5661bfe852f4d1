"""examples/benchmarks/long_run.py: memory is counted with that of child processes, and runs leave none behind."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from afq_export.spec.catalog import data_root

SCRIPT = data_root() / "examples" / "benchmarks" / "long_run.py"
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="memory of a process tree needs /proc")


@pytest.fixture(scope="module")
def long_run() -> ModuleType:
    """The script; examples are no package."""
    spec = importlib.util.spec_from_file_location("long_run", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory_of_a_tree(long_run: ModuleType) -> None:
    """A child's child that holds 40 MB; gone with them."""
    hold = "held = bytearray(b'x' * 40_000_000); print(1, flush=True); import time; time.sleep(60)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    before = long_run.memory(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", nested], stdout=subprocess.PIPE)
    try:
        assert child.stdout and child.stdout.readline() == b"1\n"
        resident, own = (now - then for now, then in zip(long_run.memory(os.getpid()), before, strict=True))
        assert resident > own > 40
        inner = [pid for pid in long_run.tree(child.pid) if pid != child.pid]
        assert len(inner) == 1
        os.kill(inner[0], 9)
    finally:
        child.wait(20)
        child.stdout.close()
    assert list(long_run.tree(child.pid)) == [child.pid], "what is gone has no children"
    assert long_run.memory(child.pid) == (0, 0)


def test_a_child_in_its_parents_memory_is_not_counted_twice(long_run: ModuleType, monkeypatch, tmp_path: Path) -> None:
    """Process 7 has started 8, which has not called exec yet, and 9, which has."""
    said = {7: {"VmPeak": 50, "VmHWM": 40, "VmRSS": 30, "RssAnon": 20}, 9: {"VmPeak": 5, "VmHWM": 4, "VmRSS": 3}}
    monkeypatch.setattr(long_run, "status", lambda pid: said[7] if pid == 8 else said[pid])
    for pid, children in ((7, "8 9"), (8, ""), (9, "")):
        task = tmp_path / str(pid) / "task" / str(pid)
        task.mkdir(parents=True)
        (task / "children").write_text(children, encoding="utf-8")
    monkeypatch.setattr(long_run, "Path", lambda path: tmp_path / path.removeprefix("/proc/"))
    assert list(long_run.tree(7)) == [7, 9]
    assert long_run.memory(7) == (33 * 1024 / 1e6, 20 * 1024 / 1e6)


def test_growth_and_broken_promises_fail(long_run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(long_run, "ask", lambda arguments: {"memory": {"calibrate": 100.0, "lower": 90.0}})
    monkeypatch.setattr(long_run.Sampler, "start", lambda self: None)
    for after, peak, code in (((9, 50, 50), 119.0, 0), ((9, 50, 99), 99.0, 1), ((9, 50, 50), 121.0, 1)):
        left = iter(after)
        row = {"before": 0.0, "peak": peak, "seconds": 1.0}
        monkeypatch.setattr(long_run, "one_run", lambda *_, row=row, left=left: row | {"after": float(next(left))})
        assert long_run.main(["--target", "any"]) == code
    assert "growth from the second round to the last: +49 MB" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_leave_nothing_behind() -> None:
    """Two targets, four times, in a process of its own; tiny models: a leak of a model's size would not be seen, one of
    sessions, graphs and buffers would."""
    command = [sys.executable, str(SCRIPT), "--target", "android-xnnpack", "--target", "linux-x64-ort", "--rounds", "4"]
    options = ["--seconds", "0.2", "--model", "demo-llama", "--tiny", "--recipe", "w8a8-dynamic+rtn", "--threads", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-1000:]
    assert done.stdout.count("| `linux-x64-ort` |") == 4
