"""The kinds of devices: what is there for each, what is missing, and which devices are attached now."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable

from afq_export.device.adb import list_adb
from afq_export.device.arm64.environment import SET_UP, open_environment
from afq_export.device.build import AARCH64, NATIVE, ONNX, installed_package
from afq_export.device.kit import missing_for
from afq_export.errors import MissingToolError
from afq_export.machine import cpu_name
from afq_export.spec.device import Attached, Kind, Listing

INSTALL = SET_UP.removeprefix("run ").strip("`")
READY, NONE = "ready", "-"
PACKAGE = "install the Debian package "


def listing() -> Listing:
    """Everything that can be known without connecting to a board: starts adb's server where adb is installed."""
    found = kinds()
    return Listing(kinds=found, attached=tuple(_attached(found)))


def kinds() -> tuple[Kind, ...]:
    """One entry per kind. Starts nothing."""
    return (_host(), _arm64(), _ssh(), _adb())


def _host() -> Kind:
    python = installed_package("onnxruntime") is not None  # then its own runner is not needed
    missing = tuple(line for line in _runners(NATIVE) if not (python and line.startswith(ONNX)))
    do = "install ExecuTorch and a C++ compiler" if missing else ""
    return Kind(kind="host", form="host", found=f"{cpu_name()}, {platform.machine()}", missing=missing, do=do)


def _arm64() -> Kind:
    try:
        installed = open_environment(check=False).installed
    except MissingToolError as error:
        return Kind(kind="arm64", form="arm64:CPU", found=NONE, missing=(error.what,), do=INSTALL)
    versions = ", ".join(f"{name} {number}" for name, number in installed.versions.items())
    missing = _runners(AARCH64)
    return Kind(
        kind="arm64",
        form="arm64:CPU",
        found=f"{installed.emulator}; {versions}",
        missing=missing,
        do=INSTALL if missing else "",
    )


def _ssh() -> Kind:
    if shutil.which("ssh") is None:
        return Kind(kind="ssh", form="ssh:USER@HOST", found=NONE, missing=("ssh",), do=PACKAGE + "openssh-client")
    missing = _runners(AARCH64)
    return Kind(
        kind="ssh", form="ssh:USER@HOST", found="OpenSSH client", missing=missing, do=INSTALL if missing else ""
    )


def _adb() -> Kind:
    if shutil.which("adb") is None:
        return Kind(kind="adb", form="adb:SERIAL", found=NONE, missing=("adb",), do=PACKAGE + "adb")
    # What is built here runs on Linux: Android's C library is another.
    return Kind(kind="adb", form="adb:SERIAL", found="adb; runners for Android are named with --runner")


def _runners(abi: str) -> tuple[str, ...]:
    return tuple(f"{name} for {abi}: {why}" for name, why in missing_for(abi))


def _attached(found: Iterable[Kind]) -> Iterable[Attached]:
    for kind in found:
        if kind.kind == "host":
            yield Attached("host", READY, kind.found)
        elif kind.kind == "arm64" and kind.found != NONE:
            for cpu in open_environment(check=False).installed.processors:
                yield Attached(f"arm64:{cpu}", READY, "emulated")
        elif kind.kind == "adb" and kind.found != NONE:
            try:
                phones = list_adb()
            except MissingToolError as error:
                yield Attached("adb:", str(error), "")
                continue
            for phone in phones:
                state = READY if phone.state == "device" else phone.state
                yield Attached(f"adb:{phone.serial}", state, phone.model)
