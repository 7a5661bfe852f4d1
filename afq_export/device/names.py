"""Names of devices, as `--on` takes them: `arm64:cortex-a55,cortex-a76`. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from afq_export.device.arm64.processors import refuse_unknown
from afq_export.errors import InputError

KINDS = {"arm64": refuse_unknown}
"""Kind of device -> what refuses a name it does not know, with InputError."""


@dataclasses.dataclass(frozen=True)
class DeviceName:
    """`kind` says how a device is reached, `name` which one it is."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclasses.dataclass(frozen=True)
class DeviceRequest:
    """Devices to run an exported file on, how many of the evaluation windows, and how many tokens of each."""

    devices: tuple[DeviceName, ...]
    windows: int = 2
    window: int = 128


def parse_devices(given: Sequence[str]) -> tuple[DeviceName, ...]:
    """Devices of `KIND:NAME[,NAME...]` texts, each once, in order.

    Raises InputError for an unknown kind, an unknown name, or a text of another form.
    """
    devices: dict[DeviceName, None] = {}
    for text in given:
        kind, colon, names = text.partition(":")
        if not colon or not names.strip(","):
            raise InputError("cannot read --on", where=text, do="give KIND:NAME[,NAME...], e.g. arm64:cortex-a76")
        if kind not in KINDS:
            raise InputError("unknown kind of device", where=text, do=f"known: {', '.join(KINDS)}")
        for name in filter(None, (part.strip() for part in names.split(","))):
            KINDS[kind](name)
            devices[DeviceName(kind, name)] = None
    return tuple(devices)
