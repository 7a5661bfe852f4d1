"""`--on` is read as written, or refused with what is known."""

from __future__ import annotations

import pytest

from afq_export.device.arm64.processors import PROCESSORS
from afq_export.device.names import DeviceName, parse_devices
from afq_export.errors import InputError


def test_devices_come_once_and_in_order() -> None:
    found = parse_devices(["arm64:cortex-a76,cortex-a55", "arm64: cortex-a76 ,cortex-a710,"])
    assert found == tuple(DeviceName("arm64", name) for name in ("cortex-a76", "cortex-a55", "cortex-a710"))
    assert [str(device) for device in found] == ["arm64:cortex-a76", "arm64:cortex-a55", "arm64:cortex-a710"]
    assert parse_devices([]) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cortex-a76", "cannot read --on [cortex-a76]"),
        ("arm64:", "cannot read --on [arm64:]"),
        ("arm64:,", "cannot read --on [arm64:,]"),
        ("riscv:u74", "unknown kind of device [riscv:u74]; known: arm64"),
        ("arm64:cortex-a77", f"unknown processor [arm64:cortex-a77]; known: {', '.join(PROCESSORS)}"),
        ("arm64:cortex-a76,max", "no processor to judge on [arm64:max]: it has SME"),
    ],
)
def test_anything_else_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_devices([text])
    assert str(error.value).startswith(said)
