"""One process at a time: a second one is refused and told who is there; a dead one is never in the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afq_export.errors import InputError
from afq_export.lock import hold
from afq_export.progress import silent
from afq_export.revalidate import revalidate
from afq_export.runfolder import LOCK, held, prepare

HOLDER = """
import sys, time
from pathlib import Path
from afq_export.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that holds `run.lock`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_and_told_who_is_there(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(InputError) as refused, hold(tmp_path / "run.lock"):
        pass
    assert refused.value.what == "another run is in this folder"
    assert re.match(rf"process {other.pid} on \S+ since \d{{4}}-", refused.value.why)
    assert refused.value.why.endswith(f"-c {tmp_path / 'run.lock'}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, other: subprocess.Popen[str], number: int) -> None:
    other.send_signal(number)
    other.wait()
    assert (tmp_path / "run.lock").read_text()  # it had no time to say that it went
    with hold(tmp_path / "run.lock"):
        assert f'"process": "{os.getpid()}"' in (tmp_path / "run.lock").read_text()
    assert (tmp_path / "run.lock").read_text() == ""


def test_a_child_of_the_holder_does_not_keep_it(tmp_path: Path) -> None:
    with hold(tmp_path / "run.lock"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        with hold(tmp_path / "run.lock"):
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_it_is_free_again_after_an_error_and_in_any_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with pytest.raises(ValueError), hold(tmp_path / "run.lock"):
        raise ValueError
    with hold(tmp_path / "run.lock"), pytest.raises(InputError, match="another run"), hold(tmp_path / "run.lock"):
        pass


def test_a_folder_of_someone_else_gets_no_lock_file(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"), held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_validation_waits_for_nobody_and_looks_at_nothing_before(tmp_path: Path) -> None:
    """There is no bundle here: the lock is what is met first, so no file is hashed that a run is about to replace."""
    folder = prepare(tmp_path, {}, {"tiny": True}, fresh=False)
    with hold(tmp_path / LOCK), pytest.raises(InputError, match="another run is in this folder"):
        revalidate(folder, silent)
    with pytest.raises(InputError, match="not a bundle"):
        revalidate(folder, silent)
