"""Names of devices, as `--device` takes them: `host`, `arm64:cortex-a76`, `ssh:pi@board`, `adb:SERIAL`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from afq_export.device.arm64.processors import refuse_unknown
from afq_export.device.ssh import parse_target
from afq_export.errors import InputError

SERIAL = re.compile(r"(?!-)[\w.:-]*")
"""What adb calls a device; empty: the only one there is."""


def refuse_serial(text: str) -> None:
    """Raises InputError for what can be no serial number of adb."""
    if not SERIAL.fullmatch(text):
        raise InputError("not a serial number", where=f"adb:{text}", do="see `adb devices`")


KINDS = {"host": None, "arm64": refuse_unknown, "ssh": parse_target, "adb": refuse_serial}
"""Kind of device -> what refuses a name it does not know, with InputError; None: there is one, without a name."""
FORMS = "host, arm64:CPU, ssh:USER@HOST, adb:SERIAL"


@dataclasses.dataclass(frozen=True)
class DeviceName:
    """`kind` says how a device is reached, `name` which one it is."""

    kind: str
    name: str = ""

    def __str__(self) -> str:
        return self.kind if KINDS[self.kind] is None else f"{self.kind}:{self.name}"


@dataclasses.dataclass(frozen=True)
class DeviceRequest:
    """Devices to run an exported file on, how many of the evaluation windows, and how many tokens of each.

    `runner`: a prebuilt one. `keep`: leave what was copied there. `threads` on the device.
    """

    devices: tuple[DeviceName, ...]
    windows: int = 2
    window: int = 128
    runner: Path | None = None
    keep: bool = False
    threads: int = 1


def refuse_lone_runner(runner: Path | None, device: object) -> None:
    """Raises InputError when a runner is given and no device to run it on."""
    if runner and not device:
        raise InputError("--runner is for a device", where=str(runner), do="name one with --device")


def one_device(device: str | None, runner: Path | None, threads: int | None) -> DeviceRequest | None:
    """What `--device`, `--runner` and `--threads` ask for, None without a device. Raises InputError like its parts."""
    refuse_lone_runner(runner, device)
    return DeviceRequest((parse_device(device),), runner=runner, threads=threads or 1) if device else None


def parse_device(text: str) -> DeviceName:
    """One device. Raises InputError for an unknown kind, an unknown name, or a text of another form."""
    kind, colon, name = text.strip().partition(":")
    if kind not in KINDS:
        what = "unknown kind of device" if colon else "not a device"
        raise InputError(what, where=text, do=f"known: {FORMS}")
    refuse = KINDS[kind]
    if (refuse is None) == bool(colon):
        raise InputError("not a device", where=text, do=f"known: {FORMS}")
    if refuse:
        refuse(name)
    return DeviceName(kind, name)


def parse_devices(given: Sequence[str]) -> tuple[DeviceName, ...]:
    """Devices of texts, each once, in order; `arm64:` takes several names with commas. Raises InputError."""
    devices: dict[DeviceName, None] = {}
    for text in given:
        kind, _, names = text.partition(":")
        if kind != "arm64":
            devices[parse_device(text)] = None
            continue
        split = [name.strip() for name in names.split(",") if name.strip()]
        for name in split or [""]:
            devices[parse_device(f"arm64:{name}")] = None
    return tuple(devices)
