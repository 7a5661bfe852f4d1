"""What the environment is made of (pins.toml), and what it is to be with the versions of this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from afq_export.spec.strict import Data, convert, read_toml

TABLE = Path(__file__).with_name("pins.toml")


class Packages(Data):
    """Debian packages of one suite."""

    suite: str
    packages: tuple[str, ...]


class Wheel(Data):
    """A wheel for aarch64. `sha256` empty: nothing is known to hold it to. `keep`: beginnings of what is unpacked.

    `as_here`: the version is that of this machine's Python, so that the same release runs on both sides.
    """

    name: str
    version: str
    sha256: str
    keep: tuple[str, ...]
    as_here: bool = False


class Pins(Data):
    """pins.toml."""

    python: str
    emulator: Packages
    system: Packages
    headers: Packages
    compiler: Packages
    wheels: tuple[Wheel, ...]
    digests: dict[str, dict[str, str]] = {}
    """Wheel -> other version -> sha256."""


def read_pins(path: Path = TABLE) -> Pins:
    """The table, with the versions that this machine has, and their digests where the table has them."""
    pins = convert(read_toml(path), Pins, str(path))
    return msgspec.structs.replace(
        pins, wheels=tuple(_as_here(wheel, pins.digests.get(wheel.name, {})) for wheel in pins.wheels)
    )


def fingerprint(pins: Pins) -> str:
    """Hex sha256 of everything that decides what an environment holds; the compiler leaves nothing in it."""
    return hashlib.sha256(
        msgspec.json.encode((pins.python, pins.emulator, pins.system, pins.headers, pins.wheels))
    ).hexdigest()


def _as_here(wheel: Wheel, digests: Mapping[str, str]) -> Wheel:
    if not wheel.as_here:
        return wheel
    try:
        found = version(wheel.name).partition("+")[0]
    except PackageNotFoundError:
        return wheel
    return (
        wheel
        if found == wheel.version
        else msgspec.structs.replace(wheel, version=found, sha256=digests.get(found, ""))
    )
