"""`--device` is read as written, or refused with what is known."""

from __future__ import annotations

import pytest

from afq_export.device.arm64.processors import PROCESSORS
from afq_export.device.names import FORMS, DeviceName, parse_device, parse_devices
from afq_export.errors import InputError


def test_devices_come_once_and_in_order() -> None:
    found = parse_devices(["arm64:cortex-a76,cortex-a55", "arm64: cortex-a76 ,cortex-a710,"])
    assert found == tuple(DeviceName("arm64", name) for name in ("cortex-a76", "cortex-a55", "cortex-a710"))
    assert [str(device) for device in found] == ["arm64:cortex-a76", "arm64:cortex-a55", "arm64:cortex-a710"]
    assert parse_devices([]) == ()


@pytest.mark.parametrize(
    "text", ["host", "arm64:cortex-a53", "ssh:pi@board", "ssh:board:2222", "adb:", "adb:R58M123", "adb:127.0.0.1:5555"]
)
def test_every_kind_reads_back_as_written(text: str) -> None:
    assert str(parse_device(text)) == text and parse_devices([text, text]) == (parse_device(text),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cortex-a76", f"not a device [cortex-a76]; known: {FORMS}"),
        ("", f"not a device; known: {FORMS}"),
        ("host:other", f"not a device [host:other]; known: {FORMS}"),
        ("ssh", f"not a device [ssh]; known: {FORMS}"),
        ("adb", f"not a device [adb]; known: {FORMS}"),
        ("arm64:", "unknown processor [arm64:]"),
        ("arm64:,", "unknown processor [arm64:]"),
        ("riscv:u74", f"unknown kind of device [riscv:u74]; known: {FORMS}"),
        ("arm64:cortex-a77", f"unknown processor [arm64:cortex-a77]; known: {', '.join(PROCESSORS)}"),
        ("arm64:cortex-a76,max", "no processor to judge on [arm64:max]: it has SME"),
        ("ssh:-oProxyCommand=x", "not a target for ssh [ssh:-oProxyCommand=x]"),
        ("ssh:a b", "not a target for ssh [ssh:a b]"),
        ("adb:-s", "not a serial number [adb:-s]"),
        ("adb:a;b", "not a serial number [adb:a;b]"),
    ],
)
def test_anything_else_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_devices([text])
    assert str(error.value).startswith(said)
