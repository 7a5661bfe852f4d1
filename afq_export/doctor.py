"""What is installed against what was tested, what a target misses here, and the machine. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version

from afq_export.errors import InputError, MissingToolError
from afq_export.machine import cores, cpu_flags, cpu_name, memory_mb
from afq_export.spec.catalog import TARGETS, data_root, entries, load_target
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


class Device(Data):
    """An emulation that `validate --on` can use: what is set up, and else what to do."""

    kind: str
    found: str
    install: str


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
    devices: tuple[Device, ...] = ()


def diagnose(needed: str = "android-xnnpack") -> Diagnosis:
    """The state of this installation; `needed` is the target that decides `ready`."""
    packages = tuple(check(name, tested) for name, tested in requirements().items())
    targets = tuple(_tools(entry.name, packages) for entry in entries(TARGETS))
    blocked = any(tools.missing for tools in targets if tools.target == needed)
    python = _python()
    ready = not blocked and python.status == "ok" and not any(p.status == "missing" for p in packages)
    memory = memory_mb()
    machine = Machine(platform.platform(), cpu_name(), cores(), memory and round(memory), cpu_flags())
    return Diagnosis(python, packages, targets, machine, ready, (_arm64(),))


def install(kind: str, say: Callable[[str], None]) -> str:
    """Sets the emulation of `kind` up and returns its folder. Raises InputError for another kind, MissingToolError."""
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


def _arm64() -> Device:
    from afq_export.device.arm64.environment import SET_UP, open_environment

    try:
        installed = open_environment(check=False).installed
    except MissingToolError as error:
        return Device("arm64", error.what, SET_UP.removeprefix("run ").strip("`"))
    versions = ", ".join(f"{name} {number}" for name, number in installed.versions.items())
    return Device("arm64", f"{installed.emulator}; {versions}", "")


def _tools(target: str, packages: tuple[Package, ...]) -> Tools:
    missing = tuple(tool for tool in load_target(target).tools if importlib.util.find_spec(tool) is None)
    lines = {package.name: package.install for package in packages}
    return Tools(target, missing, " && ".join(lines.get(tool, f"pip install {tool}") for tool in missing))
