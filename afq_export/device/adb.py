"""`adb:SERIAL`: an Android device, reached with the adb program of this machine."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

from afq_export.device.process import Output, execute
from afq_export.device.remote import Setup, ShellDevice
from afq_export.device.tools import last_line
from afq_export.device.transport import gone
from afq_export.errors import AfqError, InputError, MissingToolError

LIST_S = 20.0
"""For `adb devices`, which may have to start adb's server."""

_STATES = {
    "unauthorized": ("it does not trust this machine", "unlock it and accept the debugging key that it shows"),
    "authorizing": ("it is asking whether to trust this machine", "unlock it and accept the debugging key"),
    "offline": ("it is offline", "plug it in again, or `adb reconnect`"),
    "no permissions": ("this user may not use its USB port", "see udev rules, or restart adb's server as root"),
    "recovery": ("it is in recovery", "start Android"),
    "sideload": ("it is in recovery", "start Android"),
    "bootloader": ("it is in its bootloader", "start Android"),
    "host": ("it is no device", "start Android"),
}
"""State of adb other than `device` -> why it cannot be used, and what to do."""


@dataclasses.dataclass(frozen=True)
class Attached:
    """One line of `adb devices`: `state` is device when it can be used, `model` may be empty."""

    serial: str
    state: str
    model: str = ""


def list_adb() -> tuple[Attached, ...]:
    """The devices that adb sees, in its order.

    Raises MissingToolError when adb is not installed or its server does not start.
    """
    _require_adb("adb")
    try:
        output = execute(["adb", "devices", "-l"], timeout=LIST_S)
    except subprocess.TimeoutExpired as error:
        raise MissingToolError(
            "adb does not answer", why=f"nothing within {LIST_S:g} s", do="adb kill-server"
        ) from error
    if output.code:
        raise MissingToolError("adb does not list devices", why=last_line(output.stderr, output.code))
    return read_devices(output.stdout.decode(errors="replace"))


def read_devices(text: str) -> tuple[Attached, ...]:
    """Devices in the words of `adb devices -l`, which begins with a line about itself."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or line.startswith(("*", "List of devices")):
            continue
        state = "no permissions" if words[1:3] == ["no", "permissions"] else words[1]
        model = next((word.removeprefix("model:") for word in words if word.startswith("model:")), "")
        found.append(Attached(words[0], state, model.replace("_", " ")))
    return tuple(found)


class AdbLink:
    """A `Link` (afq_export/device/remote.py) of adb's `exec-out`, `push` and `pull`."""

    kind = "adb"
    bases = ("/data/local/tmp",)
    """The only folder that adb's shell may both write and run programs from."""

    def __init__(self, serial: str) -> None:
        self.name, self.serial = f"adb:{serial}", serial

    def shell(self, script: str, timeout: float, stdin: Path | None = None, stdout: Path | None = None) -> Output:
        """Runs a script there. `exec-out` has no terminal in between, which would change bytes, and no exit code."""
        return self._adb(["exec-out", script], timeout)

    def send(self, local: Path, remote: str, timeout: float) -> str:
        """Copies a file there."""
        return _words(self._adb(["push", str(local), remote], timeout))

    def fetch(self, remote: str, local: Path, timeout: float) -> str:
        """Copies a file here."""
        return _words(self._adb(["pull", remote, str(local)], timeout))

    def fault(self, output: Output) -> AfqError:
        """What adb's server says of the device, or of itself."""
        why = last_line(output.stderr, output.code)
        try:
            refuse_unusable(self.serial, list_adb())
        except AfqError as error:
            return error
        return gone(self.name, f"the connection was lost: {why}")

    def _adb(self, words: list[str], timeout: float) -> Output:
        return execute(["adb", "-s", self.serial, *words], timeout=timeout)


def open_adb(serial: str = "", setup: Setup | None = None) -> ShellDevice:
    """The device of `serial`, or the only one there is. $ANDROID_ADB_SERVER_PORT and the like are adb's own.

    Raises MissingToolError when adb is not installed or the device cannot be used, InputError when several could be.
    """
    _require_adb(f"adb:{serial}")
    attached = list_adb()
    if not serial:
        serial = _only(attached)
    refuse_unusable(serial, attached)
    return ShellDevice(AdbLink(serial), setup or Setup())


def refuse_unusable(serial: str, attached: tuple[Attached, ...]) -> None:
    """Raises MissingToolError unless `serial` is among the devices and can be used."""
    name = f"adb:{serial}"
    states = {device.serial: device.state for device in attached}
    if serial not in states:
        do = "plug it in with USB debugging on, or `adb connect` it"
        raise gone(name, f"adb sees {', '.join(states) or 'no device'}", do)
    if states[serial] != "device":
        why, do = _STATES.get(states[serial], (f"adb says {states[serial]}", ""))
        raise gone(name, why, do)


def _only(attached: tuple[Attached, ...]) -> str:
    """Serial of the one device there is. Raises InputError when there are more, MissingToolError when there is none."""
    if not attached:
        raise gone("adb:", "adb sees no device", "plug one in with USB debugging on, or `adb connect` it")
    if len(attached) > 1:
        serials = ", ".join(f"adb:{device.serial}" for device in attached)
        raise InputError("several devices", where="adb:", why=f"adb sees {len(attached)}", do=f"name one: {serials}")
    return attached[0].serial


def _require_adb(where: str) -> None:
    if shutil.which("adb") is None:
        do = "install the Debian package adb, or put Android's platform-tools on the path"
        raise MissingToolError("no adb", where=where, why="adb is not on this machine", do=do)


def _words(output: Output) -> str:
    """What a transfer complained of; adb says it on either stream."""
    return output.stderr + output.stdout.decode(errors="replace") if output.code else ""
