"""What holds of every device with a shell: this machine, busybox alone, a real sshd, Android's shell behind adb."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from afq_export.device import posix
from afq_export.device.adb import open_adb
from afq_export.device.host import HostLink, open_host
from afq_export.device.remote import Setup, ShellDevice
from afq_export.device.ssh import open_ssh
from afq_export.device.transport import ended_well
from afq_export.errors import AfqError, InputError, MissingToolError, VerdictError
from tests.device.standins import adb_server, board, connect, make_keys, phone, running, wait_for

AWKWARD = "a b'c\"d$HOME`id`\\n*é;&|(\n-"
"""Nothing of it may mean anything to a shell on the way."""
MIB = 2**20
DISK = 22 * MIB
"""Of the stand-ins: as much as need be left free, and a little more."""
with_a_small_disk = pytest.mark.parametrize("place", ["ssh", "adb"], indirect=True)


class BusyboxLink(HostLink):
    """This machine as a board that has only busybox."""

    def __init__(self, tools: Path) -> None:
        self.tools = tools

    def _command(self, script: str) -> list[str]:
        return ["/usr/bin/env", f"PATH={self.tools}", str(self.tools / "sh"), "-c", script]


@dataclass
class Place:
    """A device, and its disk as seen without it."""

    device: ShellDevice
    disk: Path

    def left(self) -> list[str]:
        return sorted(os.listdir(self.disk))


@contextlib.contextmanager
def place_of(kind: str, tmp: Path) -> Iterator[Place]:
    local = tmp / "scratch"
    local.mkdir()
    if kind == "host":
        yield Place(open_host(Setup(folder=str(local))), local)
    elif kind == "busybox":
        program = shutil.which("busybox")
        if program is None:
            pytest.skip("needs busybox (Debian package busybox-static)")
        tools = tmp / "tools"
        tools.mkdir()
        subprocess.run([program, "--install", "-s", str(tools)], check=True)
        yield Place(ShellDevice(BusyboxLink(tools), Setup(folder=str(local), python=sys.executable)), local)
    elif kind == "ssh":
        keys = make_keys(tmp / "keys")
        with board(tmp, keys, size=str(DISK)) as standin, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AFQ_SSH", f"ssh -F {keys.config}")
            yield Place(open_ssh("127.0.0.1", Setup(folder=standin.scratch)), standin.disk)
    else:
        with adb_server(tmp), phone(tmp, str(DISK)) as standin:
            yield Place(open_adb(connect(standin.port)), standin.disk)


@pytest.fixture(scope="module", params=["host", "busybox", "ssh", "adb"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place_of(request.param, tmp_path_factory.mktemp(request.param)) as place:
        yield place


@pytest.fixture(autouse=True)
def nothing_is_left(place: Place) -> Iterator[None]:
    yield
    assert place.left() == []


def test_facts(place: Place) -> None:
    facts = place.device.facts()
    assert facts.name == place.device.name
    assert (facts.kind == "adb") == (facts.os == "android") == (facts.abi == "aarch64") == (facts.model != "")
    total = int(Path("/proc/meminfo").read_text().split()[1]) // 1024
    assert facts.memory_mb == total
    disk = os.statvfs(place.disk)
    assert abs(facts.free_mb - disk.f_bavail * disk.f_frsize / MIB) < 64
    assert facts.processor.startswith(f"{os.cpu_count()}x ")
    assert facts.cpu_features
    assert not place.device.emulated
    if place.device.name == "host":
        assert facts.abi == os.uname().machine
        assert facts.python == sys.executable


def test_a_file_goes_there_and_back(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3 * MIB) + bytes(range(256)))
    with place.device.folder() as folder:
        name = f"{folder}/deep/er/{AWKWARD}"
        place.device.push(file, name)
        there = place.disk / os.path.basename(folder) / "deep" / "er" / AWKWARD
        assert there.read_bytes() == file.read_bytes()
        assert not there.stat().st_mode & stat.S_IXUSR
        assert stat.S_IMODE((place.disk / os.path.basename(folder)).stat().st_mode) == 0o700
        place.device.pull(name, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == file.read_bytes()
        file.write_bytes(b"")
        place.device.push(file, name)
        place.device.pull(name, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b""


def test_a_program_runs(place: Place, tmp_path: Path) -> None:
    program = tmp_path / "pro gram"
    program.write_text('#!/bin/sh\nprintf "%s/" "$@" "$ONE" "$PWD"; cat; echo said >&2; exit 7\n')
    program.chmod(0o755)
    with place.device.folder() as folder:
        place.device.push(program, f"{folder}/pro gram")
        done = place.device.run(
            ["./pro gram", AWKWARD, "", "-x"], folder=folder, env={"ONE": AWKWARD, "TWO": "2"}, timeout=20
        )
    assert done.stdout.decode() == f"{AWKWARD}//-x/{AWKWARD}/{folder}/"
    assert (done.code, done.signal, done.stderr) == (7, None, "said\n")


def test_exit_codes_and_signals_arrive(place: Place) -> None:
    with place.device.folder() as folder:
        for code in (0, 1, 126, 128, 193, 255):
            done = place.device.run(["sh", "-c", f"exit {code}"], folder=folder, timeout=20)
            assert (done.code, done.signal, done.stdout, done.stderr) == (code, None, b"", "")
        for number in (signal.SIGABRT, signal.SIGKILL):
            done = place.device.run(["sh", "-c", f"kill -{int(number)} $$"], folder=folder, timeout=20)
            assert (done.code, done.signal, done.stdout, done.stderr) == (128 + number, number, b"", "")


def test_every_byte_arrives(place: Place, tmp_path: Path) -> None:
    every = bytes(range(256)) * 300 + b"\n\n"
    (tmp_path / "bytes").write_bytes(every)
    with place.device.folder() as folder:
        place.device.push(tmp_path / "bytes", f"{folder}/bytes")
        done = place.device.run(["cat", "bytes"], folder=folder, timeout=20)
        assert done.stdout == every
        long = place.device.run(["sh", "-c", "cat bytes bytes >&2; echo the end >&2"], folder=folder, timeout=20)
    assert long.stdout == b""
    assert long.stderr.endswith("\n\nthe end\n")


def test_a_crash_is_a_verdict(place: Place) -> None:
    crash = ["sh", "-c", "echo loading; echo about to fall >&2; kill -11 $$"]
    pattern = rf"runner failed \[{place.device.name}\]: it was killed by SIGSEGV \(about to fall\)"
    with pytest.raises(VerdictError, match=pattern), place.device.folder() as folder:
        done = place.device.run(crash, folder=folder, timeout=20)
        assert (done.stdout, done.signal, done.code) == (b"loading\n", 11, 139)
        ended_well(place.device, done, "runner")


def test_a_program_that_is_not_there(place: Place) -> None:
    with place.device.folder() as folder:
        done = place.device.run(["./none"], folder=folder, timeout=20)
    assert done.code == 127
    assert "none" in done.stderr


def test_a_file_that_is_not_there(place: Place, tmp_path: Path) -> None:
    with place.device.folder() as folder:
        with pytest.raises(VerdictError, match="left no such file"):
            place.device.pull(f"{folder}/none", tmp_path / "none")
        with pytest.raises(InputError, match="cannot read file"):
            place.device.push(tmp_path / "none", f"{folder}/none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, VerdictError])
def test_the_folder_goes_after_an_error(place: Place, error: type[BaseException]) -> None:
    with pytest.raises(error, match=r"^this one$"), place.device.folder() as folder:
        assert place.left() == [os.path.basename(folder)]
        raise error("this one")


def test_the_folder_is_kept_when_asked_for(place: Place) -> None:
    number = sleeper()
    with place.device.folder(keep=True) as folder:
        place.device.run(["sh", "-c", in_background(number)], folder=folder, timeout=20)
    wait_for(lambda: not running(number), "what runs in it is stopped")
    assert place.left() == [os.path.basename(folder)]
    shutil.rmtree(place.disk / os.path.basename(folder))


def test_what_a_program_leaves_running_is_stopped(place: Place) -> None:
    number = sleeper()
    with place.device.folder() as folder:
        place.device.run(["sh", "-c", in_background(number)], folder=folder, timeout=20)
        assert running(number)
    wait_for(lambda: not running(number), "it is stopped")


def test_a_program_that_does_not_end(place: Place) -> None:
    number = sleeper()
    pattern = rf"program does not end \[{place.device.name}\]: sleep was stopped after 0.5 s"
    with place.device.folder() as folder:
        with pytest.raises(MissingToolError, match=pattern):
            place.device.run(["sleep", number], folder=folder, timeout=0.5)
        wait_for(lambda: not running(number), "it is stopped")


def test_ctrl_c(place: Place) -> None:
    number = sleeper()

    def interrupt() -> None:
        wait_for(lambda: running(number), "it runs")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
    try:
        with pytest.raises(KeyboardInterrupt), place.device.folder() as folder:
            thread.start()
            place.device.run(["sleep", number], folder=folder, timeout=60)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: not running(number), "it is stopped")


@with_a_small_disk
def test_a_file_too_large_is_not_begun(place: Place, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, DISK)
    pattern = r"device is full \[.*are needed, \d+\.\d MiB are free"
    with pytest.raises(MissingToolError, match=pattern), place.device.folder() as folder:
        place.device.push(large, f"{folder}/large")


@with_a_small_disk
def test_a_disk_that_fills_meanwhile(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, DISK + MIB)
    honest, lies = posix.free_bytes, iter([10**9])
    monkeypatch.setattr(posix, "free_bytes", lambda line: next(lies, honest(line)))
    link = place.device._link
    send = link.send  # the stand-in of adbd says nothing on a full disk, and adb waits
    monkeypatch.setattr(link, "send", lambda local, there, _: send(local, there, 3.0))
    with pytest.raises(MissingToolError, match="device is full"), place.device.folder() as folder:
        place.device.push(large, f"{folder}/large")


@with_a_small_disk
def test_a_program_that_fills_the_disk(place: Place) -> None:
    fill = "head -c 99999999 /dev/zero >zeros 2>/dev/null; exit 1"
    with pytest.raises(MissingToolError, match="device is full"), place.device.folder() as folder:
        place.device.run(["sh", "-c", fill], folder=folder, timeout=20)


def test_damage_on_the_way_is_seen(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"right" * 1000)
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"wrong" * 1000)
    short = tmp_path / "short"
    short.write_bytes(b"right" * 999)
    link = place.device._link
    send = link.send
    with place.device.folder() as folder:
        for other, why in ((wrong, "file has another sha256 there"), (short, "4995 of 5000 bytes of file arrived")):
            monkeypatch.setattr(link, "send", lambda local, *rest, other=other: send(other, *rest))
            with pytest.raises(MissingToolError, match=rf"transfer was interrupted .*{why}"):
                place.device.push(file, f"{folder}/file")
        monkeypatch.undo()
        place.device.push(file, f"{folder}/file")
        for text, why in (("wrong" * 1000, "another sha256 here"), ("right" * 999, "4995 of 5000 bytes")):
            monkeypatch.setattr(link, "fetch", lambda _, local, __, text=text: local.write_text(text) and "")
            with pytest.raises(MissingToolError, match=why):
                place.device.pull(f"{folder}/file", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "short", "wrong"]


def test_without_a_program_for_digests_sizes_are_compared(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    finished = place.device._ask(posix.identity(str(tmp_path / "file")), 20)
    assert posix.read_identity(finished.stdout) == (5, hashlib.sha256(b"12345").hexdigest())
    assert posix.read_identity(b"5\n") == (5, "")


def test_nothing_but_a_scratch_folder_is_removed() -> None:
    for path in ("/", "/data/local/tmp", "/tmp/afq-0123", "/tmp/afq-0123456789abcdef/..", "afq-0123456789abcdef"):
        with pytest.raises(ValueError, match="not a scratch folder"):
            posix.remove_folder(path)


def test_a_folder_that_cannot_be_written(place: Place) -> None:
    device = ShellDevice(place.device._link, Setup(folder="/proc/self"))
    with pytest.raises(MissingToolError, match="device has no room for us"), device.folder():
        pass
    with pytest.raises(AfqError, match="device has no room for us"):
        ShellDevice(place.device._link, Setup(folder="/none there")).facts()


def sleeper() -> str:
    """Seconds that no other process sleeps."""
    return f"4{int.from_bytes(os.urandom(3), 'big')}"


def in_background(number: str) -> str:
    return f"sleep {number} </dev/null >/dev/null 2>&1 &"
