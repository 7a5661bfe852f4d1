"""Faults of Android devices through a real adb server: one clear line each, and nothing is left behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from afq_export.device import adb, remote
from afq_export.device.adb import Attached, list_adb, open_adb, read_devices, refuse_unusable
from afq_export.device.arm64.environment import SET_UP
from afq_export.errors import InputError, MissingToolError
from tests.device.standins import (
    Standin,
    adb_server,
    arm64_environment,
    connect,
    distrustful_phone,
    phone,
    running,
    wait_for,
)

MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with adb_server(tmp_path_factory.mktemp("adb")):
        yield


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[tuple[Standin, str]]:
    """A device and its serial."""
    with phone(tmp_path, "300m") as standin:
        yield standin, connect(standin.port)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a device to come back."""
    monkeypatch.setattr(remote, "RETURN_S", 0.0)


def test_what_is_attached(attached: tuple[Standin, str]) -> None:
    assert list_adb()[-1] == Attached(attached[1], "device", "QEMU A76")


def test_the_only_device_needs_no_serial(attached: tuple[Standin, str], tmp_path: Path) -> None:
    forget_others(attached[1])
    device = open_adb()
    assert device.name == f"adb:{attached[1]}"
    with device.folder() as folder:
        assert device.run(["pwd"], folder=folder, timeout=20).stdout.decode() == f"{folder}\n"
        assert folder.startswith("/data/local/tmp/afq-")
    (tmp_path / "second").mkdir()
    with phone(tmp_path / "second") as second:
        other = connect(second.port)
        with pytest.raises(InputError, match=r"several devices \[adb:\]: adb sees 2; name one: adb:127"):
            open_adb()
        assert open_adb(other).facts().name == f"adb:{other}"


def test_no_device() -> None:
    forget_others("")
    with pytest.raises(MissingToolError, match=r"^device is gone \[adb:\]: adb sees no device; plug one in"):
        open_adb()
    with pytest.raises(MissingToolError, match=r"^device is gone \[adb:R58M123\]: adb sees no device; plug it in"):
        open_adb("R58M123")


def test_a_device_that_does_not_trust_this_machine() -> None:
    with distrustful_phone() as port:
        serial = connect(port)
        wait_for(lambda: Attached(serial, "unauthorized") in list_adb(), "it is refused")
        with pytest.raises(MissingToolError, match=r"trust this machine; unlock it and accept") as raised:
            open_adb(serial)
    assert raised.value.exit_code == 3
    forget_others("")


def test_it_is_unplugged_while_a_program_runs(at_once: None, attached: tuple[Standin, str]) -> None:
    standin, serial = attached
    device, number = open_adb(serial), f"7{os.getpid()}"

    def unplug() -> None:
        wait_for(lambda: running(number), "it runs")
        standin.pull_the_plug()

    thread = threading.Thread(target=unplug)
    pattern = rf"^device is gone \[adb:{serial}\]: .*; remove /data/local/tmp/afq-[0-9a-f]{{16}} there$"
    with pytest.raises(MissingToolError, match=pattern), device.folder() as folder:
        thread.start()
        device.run(["sleep", number], folder=folder, timeout=60)
    thread.join()


def test_it_is_unplugged_while_a_file_is_sent(at_once: None, attached: tuple[Standin, str], tmp_path: Path) -> None:
    standin, serial = attached
    device = open_adb(serial)
    file = tmp_path / "weights"
    file.touch()
    os.truncate(file, 200 * MIB)

    def unplug() -> None:
        wait_for(lambda: any(path.is_file() for path in standin.disk.rglob("*")), "it arrives")
        standin.pull_the_plug()

    thread = threading.Thread(target=unplug)
    with pytest.raises(MissingToolError, match=rf"^device is gone \[adb:{serial}\]: "), device.folder() as folder:
        thread.start()
        device.push(file, f"{folder}/weights")
    thread.join()


def test_the_server_of_adb_ends_meanwhile(at_once: None, attached: tuple[Standin, str]) -> None:
    standin, serial = attached
    device, number = open_adb(serial), f"8{os.getpid()}"

    def end() -> None:
        wait_for(lambda: running(number), "it runs")
        adb.execute(["adb", "kill-server"], timeout=20)

    thread = threading.Thread(target=end)
    with pytest.raises(MissingToolError, match=rf"^device is gone \[adb:{serial}\]: "), device.folder() as folder:
        thread.start()
        device.run(["sleep", number], folder=folder, timeout=60)
    thread.join()
    assert len(standin.left()) == 1


def test_it_comes_back_in_time(attached: tuple[Standin, str]) -> None:
    standin, serial = attached
    device, number = open_adb(serial), f"9{os.getpid()}"

    def unplug_and_plug_in() -> None:
        wait_for(lambda: running(number), "it runs")
        adb.execute(["adb", "disconnect", serial], timeout=20)
        wait_for(lambda: not list_adb(), "it is gone")
        time.sleep(0.3)
        connect(standin.port)

    forget_others(serial)
    thread = threading.Thread(target=unplug_and_plug_in)
    lost = pytest.raises(MissingToolError, match=rf"^device is gone \[adb:{serial}\]: ")
    with lost as raised, device.folder() as folder:
        thread.start()
        device.run(["sleep", number], folder=folder, timeout=60)
    thread.join()
    assert "remove" not in str(raised.value)
    assert standin.left() == []
    wait_for(lambda: not running(number), "it is stopped")


@pytest.mark.skipif(arm64_environment() is None, reason=f"the arm64 emulation is not installed: {SET_UP}")
def test_it_runs_arm_programs(tmp_path: Path) -> None:
    place = arm64_environment()
    with phone(tmp_path, arm64=place) as standin:
        device = open_adb(connect(standin.port))
        assert device.emulated
        with device.folder() as folder:
            device.push(place.python, f"{folder}/python")
            code = "import platform; print(platform.machine(), platform.libc_ver()[0])"
            done = device.run(["./python", "-S", "-c", code], folder=folder, env={"PYTHONHOME": "/usr"}, timeout=60)
            assert (done.code, done.stdout, done.stderr) == (0, b"aarch64 glibc\n", "")
        assert standin.left() == []


def test_no_adb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for act in (list_adb, open_adb):
        with pytest.raises(MissingToolError, match=r"no adb \[adb:?\]: .*install the Debian package adb"):
            act()


def test_an_adb_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "adb"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program.write_text("#!/bin/sh\necho could not install *smartsocket* listener >&2; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(MissingToolError, match=r"adb does not list devices: could not install \*smartsocket"):
        list_adb()
    program.write_text("#!/bin/sh\nsleep 20\n")
    monkeypatch.setattr(adb, "LIST_S", 0.3)
    with pytest.raises(MissingToolError, match=r"adb does not answer: nothing within 0.3 s"):
        list_adb()


LISTED = """* daemon not running; starting now at tcp:5037
* daemon started successfully
List of devices attached
R58M123ABC             device usb:1-2 product:a52q model:SM_A525F device:a52q transport_id:1
emulator-5554          offline transport_id:2
0123456789             unauthorized usb:1-3 transport_id:3
AB12                   no permissions (missing udev rules? user is in the plugdev group); see [http://x] usb:1-4

"""


def test_lists_are_read() -> None:
    devices = read_devices(LISTED)
    assert devices == (
        Attached("R58M123ABC", "device", "SM A525F"),
        Attached("emulator-5554", "offline"),
        Attached("0123456789", "unauthorized"),
        Attached("AB12", "no permissions"),
    )
    assert read_devices("List of devices attached\n\n") == ()
    refuse_unusable("R58M123ABC", devices)
    whys = {"emulator-5554": "it is offline", "0123456789": "does not trust", "AB12": "may not use its USB port"}
    for serial, why in whys.items():
        with pytest.raises(MissingToolError, match=rf"device is gone \[adb:{serial}\]: .*{why}"):
            refuse_unusable(serial, devices)
    with pytest.raises(MissingToolError, match="adb sees R58M123ABC, emulator-5554, 0123456789, AB12"):
        refuse_unusable("other", devices)


def forget_others(serial: str) -> None:
    """Makes adb's server forget all network devices but one."""
    for device in list_adb():
        if device.serial != serial:
            adb.execute(["adb", "disconnect", device.serial], timeout=20)
    wait_for(lambda: {device.serial for device in list_adb()} <= {serial}, "it forgets")
