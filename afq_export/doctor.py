"""What is installed against what was tested, what a target misses here, and the machine. Imports nothing heavy."""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version

from afq_export.errors import InputError
from afq_export.extras import PARTS, kit_present, missing_here
from afq_export.machine import cores, cpu_flags, cpu_name, memory_mb
from afq_export.spec.catalog import TARGETS, data_root, entries, load_target
from afq_export.spec.device import Kind
from afq_export.spec.strict import Data

PYTHON = ((3, 11), (3, 14))
"""First version that is tested, and the first that is not."""
_REQUIREMENT = re.compile(r"([\w.-]+)\s*([^;]*)(;.*)?")
_BOUND = re.compile(r"(>=|<)\s*([\d.]+)")


class Package(Data):
    """A package: `tested` versions, the `found` one, and whether it is among them (`ok`, `other` or `missing`)."""

    name: str
    tested: str
    found: str
    status: str

    @property
    def install(self) -> str:
        """The line that puts it right."""
        return f'pip install "{self.name}{self.tested}"'


class Tools(Data):
    """A target's Python modules that are not there, and the line that installs them."""

    target: str
    missing: tuple[str, ...]
    install: str


class Extra(Data):
    """A package that only some targets need: the extra that brings it, what is found, whose terms hold for it."""

    package: str
    extra: str
    found: str
    licence: str
    targets: tuple[str, ...]


class Machine(Data):
    """Where this runs."""

    system: str
    cpu: str
    cores: int
    memory_mb: float | None
    flags: tuple[str, ...]


class Diagnosis(Data):
    """All of it. `ready`: nothing that android-xnnpack needs is missing."""

    python: Package
    packages: tuple[Package, ...]
    targets: tuple[Tools, ...]
    machine: Machine
    ready: bool
    devices: tuple[Kind, ...] = ()
    extras: tuple[Extra, ...] = ()

    @property
    def untested(self) -> str:
        """What is installed in versions that this release was not tested with, empty when nothing is."""
        others = (p for p in (self.python, *self.packages) if p.status == "other")
        return ", ".join(f"{p.name} {p.found} (tested {p.tested})" for p in others)


def diagnose(needed: str = "android-xnnpack") -> Diagnosis:
    """The state of this installation; `needed` is the target that decides `ready`."""
    from afq_export.device.listing import kinds

    packages = tuple(check(name, tested) for name, tested in requirements().items())
    targets = tuple(_tools(entry.name, packages) for entry in entries(TARGETS))
    blocked = any(tools.missing for tools in targets if tools.target == needed)
    python = _python()
    ready = not blocked and python.status == "ok" and not any(p.status == "missing" for p in packages)
    memory = memory_mb()
    machine = Machine(platform.platform(), cpu_name(), cores(), memory and round(memory), cpu_flags())
    return Diagnosis(python, packages, targets, machine, ready, kinds(), extras())


def extras() -> tuple[Extra, ...]:
    """The packages of PARTS and the vendors' kits, each with the targets that need it."""
    profiles = [load_target(entry.name) for entry in entries(TARGETS)]
    found = []
    for package in dict.fromkeys(part.package for part in PARTS):
        parts = [part for part in PARTS if part.package == package]
        modules = {part.module for part in parts}
        users = tuple(profile.name for profile in profiles if modules & set(profile.tools))
        found.append(Extra(package, f"[{parts[0].extra}]", parts[0].found or "-", parts[0].licence, users))
    for profile in profiles:
        if profile.sdk is not None:
            here = "found" if kit_present(profile.sdk) else "-"
            found.append(Extra(profile.sdk.name, "from its vendor", here, profile.sdk.licence, (profile.name,)))
    return tuple(found)


def install(kind: str, say: Callable[[str], None]) -> str:
    """Sets up the emulation of `kind` and the runners for it, and returns its folder.

    Raises InputError for another kind, MissingToolError.
    """
    from afq_export.device.arm64.install import install as install_arm64

    if kind != "arm64":
        raise InputError("nothing to install by that name", where=kind, do="known: arm64")
    return str(install_arm64(say).root)


def requirements() -> dict[str, str]:
    """Package -> tested versions as `>=2.13,<2.14`: of the checkout's pyproject.toml, else of the installed package."""
    project = data_root() / "pyproject.toml"
    if project.is_file():
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        try:
            lines = requires("afq-export") or []
        except PackageNotFoundError:
            lines = []
    matches = [_REQUIREMENT.fullmatch(line.strip()) for line in lines if "extra ==" not in line]
    return {match[1]: match[2].strip() for match in matches if match}


def check(name: str, tested: str) -> Package:
    """The installed version of a package against the tested ones."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return Package(name, tested, "-", "missing")
    return Package(name, tested, found, "ok" if within(found, tested) else "other")


def within(found: str, tested: str) -> bool:
    """Whether version `found` lies in bounds like `>=2.13,<2.14` (numbers only: what these bounds are made of)."""
    number = _numbers(found)
    return all((number < _numbers(bound)) == (relation == "<") for relation, bound in _BOUND.findall(tested))


def _numbers(text: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _python() -> Package:
    low, high = PYTHON
    tested = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    return Package("python", tested, platform.python_version(), "ok" if low <= sys.version_info[:2] < high else "other")


def _tools(target: str, packages: tuple[Package, ...]) -> Tools:
    lacks = missing_here(load_target(target))
    own = {package.name: package.install for package in packages}
    lines = dict.fromkeys(own.get(name, line) for name, line in lacks.items())
    return Tools(target, tuple(lacks), " && ".join(lines))
