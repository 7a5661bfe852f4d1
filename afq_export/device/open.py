"""A device by its name."""

from __future__ import annotations

from afq_export.device.adb import open_adb
from afq_export.device.arm64.device import open_arm64
from afq_export.device.host import open_host
from afq_export.device.names import DeviceName
from afq_export.device.remote import Setup
from afq_export.device.ssh import open_ssh
from afq_export.device.transport import Device


def open_device(name: DeviceName) -> Device:
    """The device. Raises MissingToolError when it, or what reaches or emulates it, is not there; InputError for a bad
    $AFQ_DEVICE_FOLDER, or `adb:` where several are attached.
    """
    match name.kind:
        case "host":
            return open_host()
        case "arm64":
            return open_arm64(name.name)
        case "ssh":
            return open_ssh(name.name, Setup.of_environment())
        case "adb":
            return open_adb(name.name, Setup.of_environment())
        case kind:
            raise ValueError(kind)
