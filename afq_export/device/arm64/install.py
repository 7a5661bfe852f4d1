"""Sets the environment up: download, unpack, build the runner, try both runtimes, and only then put it in place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from afq_export.device.arm64 import debian, wheels
from afq_export.device.arm64.build import CUSTOM_OPERATORS, build_runner
from afq_export.device.arm64.emulator import Emulator
from afq_export.device.arm64.environment import (
    RECORD,
    Environment,
    Installed,
    digests,
    folder,
    open_environment,
)
from afq_export.device.arm64.pins import Packages, Pins, fingerprint, read_pins
from afq_export.device.arm64.processors import PROCESSORS
from afq_export.device.tools import complaint, run
from afq_export.errors import MissingToolError
from afq_export.files import folder_beside, sha256_file, sweep, write_json

Say = Callable[[str], None]
UNUSED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "var", "usr/sbin", "sbin")
"""Folders of the Debian packages that nothing reads here."""


def install(say: Say, root: Path | None = None) -> Environment:
    """The environment for the versions of this machine's Python; one that fits and is whole is left as it is.

    Takes about 215 MB of downloads, half a minute, and 300 MB of disk in the end (twice that on the way).
    Raises MissingToolError when a tool or a package source is missing; then nothing has changed.
    """
    root = root or folder()
    try:
        return open_environment(root)
    except MissingToolError:
        pass  # whatever is not right with it, it is made anew
    pins = read_pins()
    root.parent.mkdir(parents=True, exist_ok=True)
    sweep(root.parent)
    with folder_beside(root) as part:
        _fill(part, pins, say)
    return open_environment(root)


def _fill(root: Path, pins: Pins, say: Say) -> None:
    work = root / "work"
    machine = debian.machine_architecture()
    say(f"the emulator, of Debian {pins.emulator.suite}")
    emulator = _packages(pins.emulator, machine, work / "emulator", dependencies=False)
    debian.unpack(emulator, work / "emulator" / "files")
    (root / "qemu").mkdir()
    shutil.move(work / "emulator" / "files" / "usr" / "bin" / "qemu-aarch64", root / "qemu" / "qemu-aarch64")
    say(f"Python {pins.python} and its libraries for arm64, of Debian {pins.system.suite}")
    system = _packages(pins.system, "arm64", work / "system", dependencies=True)
    debian.unpack(system, root / "system")
    for unused in UNUSED:
        shutil.rmtree(root / "system" / unused, ignore_errors=True)
    files = {}
    for wheel in pins.wheels:
        pinned = "" if wheel.sha256 else ", a version whose digest is not known here"
        say(f"{wheel.name} {wheel.version} for aarch64{pinned}")
        file = wheels.download(wheel, pins.python, work / "wheels")
        wheels.unpack(file, wheel, root / "site")
        files[file.name] = sha256_file(file)
    say(f"a cross compiler, of Debian {pins.compiler.suite}, and the runner of .pte programs")
    compiler = _packages(pins.compiler, machine, work / "compiler", dependencies=True)
    debian.unpack(compiler, work / "compiler" / "files")
    executorch = root / "site" / "executorch"
    build_runner(work / "compiler" / "files", executorch)
    shutil.rmtree(executorch / "include")
    (executorch / CUSTOM_OPERATORS).unlink()
    packages = {path.name: sha256_file(path) for path in (*emulator, *system, *compiler)}
    shutil.rmtree(work)
    say("a first start of both runtimes")
    _record(root, pins, packages, files)


def _packages(packages: Packages, architecture: str, work: Path, *, dependencies: bool) -> list[Path]:
    suite = debian.open_suite(packages.suite, architecture, work)
    return suite.download(packages.packages, dependencies=dependencies)


def _record(root: Path, pins: Pins, packages: dict[str, str], files: dict[str, str]) -> None:
    """Starts what was installed, so that Python's compiled files are there, and writes installed.json."""
    emulator = root / "qemu" / "qemu-aarch64"
    version = run([emulator, "--version"], "the emulator does not start").splitlines()[0].split("version ")[-1]
    known = run([emulator, "-cpu", "help"], "the emulator does not start", good=(0, 1)).split()
    installed = Installed(
        fingerprint=fingerprint(pins),
        emulator=f"qemu {version}",
        processors=tuple(name for name in PROCESSORS if name in known),
        python=pins.python,
        versions={wheel.name: wheel.version for wheel in pins.wheels},
        unpinned=tuple(wheel.name for wheel in pins.wheels if not wheel.sha256),
        packages=packages,
        wheels=files,
        files={},
        links={},
    )
    _try(Emulator(Environment(root, installed), installed.processors[0]), installed.versions["onnxruntime"])
    made, links = digests(root)
    write_json(root / RECORD, msgspec.to_builtins(msgspec.structs.replace(installed, files=made, links=links)))


def _try(emulator: Emulator, version: str) -> None:
    """Raises MissingToolError unless ONNX Runtime is of `version` and the runner of programs says how it is called."""
    code = "import numpy, onnxruntime; print(onnxruntime.__version__)"
    python = emulator.start([emulator.environment.python, "-S", "-c", code])  # without -B: see _record
    if python.stdout.strip() != version:
        why = complaint(python.stderr, python.returncode)
        raise MissingToolError("ONNX Runtime does not start under emulation", why=why)
    runner = emulator.start([emulator.environment.pte_runner])
    if "usage: pte_runner" not in runner.stderr:
        why = complaint(runner.stderr, runner.returncode)
        raise MissingToolError("the runner of .pte programs does not start under emulation", why=why)
