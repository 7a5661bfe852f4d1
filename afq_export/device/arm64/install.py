"""Sets the environment up: download, unpack, build the runner, try both runtimes, and only then put it in place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from afq_export.device.arm64 import debian, wheels
from afq_export.device.arm64.device import START_S, Arm64Device
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
from afq_export.device.build import AARCH64, Compiler, build, built, find_compiler, unpacked_compiler
from afq_export.device.kit import RUNNERS, runtime_of
from afq_export.device.tools import run
from afq_export.errors import MissingToolError
from afq_export.files import folder_beside, sha256_file, sweep, write_json

Say = Callable[[str], None]
UNUSED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "var", "usr/sbin", "sbin")
"""Folders of the Debian packages that nothing reads here."""


def install(say: Say, root: Path | None = None) -> Environment:
    """The environment for the versions of this machine's Python, and the runners for arm64.

    What fits and is whole is left as it is. Takes about 215 MB of downloads, half a minute, and 300 MB of disk in the
    end (twice that on the way). Raises MissingToolError when a tool or a package source is missing; then nothing has
    changed.
    """
    root = root or folder()
    try:
        environment = open_environment(root)
    except MissingToolError:  # whatever is not right with it, it is made anew
        pins = read_pins()
        root.parent.mkdir(parents=True, exist_ok=True)
        sweep(root.parent)
        with folder_beside(root) as part:
            _fill(part, pins, say)
        environment = open_environment(root)
    build_runners(say)
    return environment


def build_runners(say: Say) -> None:
    """Builds the runners that the cache lacks, with a cross compiler that is only unpacked where none is installed."""
    against = {name: runtime_of(runtime, AARCH64) for runtime, name in RUNNERS.items()}
    missing = {name: runtime for name, runtime in against.items() if not (built(name, runtime) / name).is_file()}
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="afq-compiler-") as work:
        compiler = find_compiler(AARCH64) or _compiler(Path(work), say)
        for name, runtime in missing.items():
            say(f"{name} for {AARCH64}")
            build(name, runtime, compiler)


def _compiler(work: Path, say: Say) -> Compiler:
    pins = read_pins()
    say(f"a cross compiler, of Debian {pins.compiler.suite}")
    packages = _packages(pins.compiler, debian.machine_architecture(), work / "apt", dependencies=True)
    debian.unpack(packages, work / "files")
    return unpacked_compiler(work / "files", AARCH64)


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
    say(f"headers of ONNX Runtime, of Debian {pins.headers.suite}")
    headers = _packages(pins.headers, machine, work / "headers", dependencies=False)
    debian.unpack(headers, root / "headers")
    packages = {path.name: sha256_file(path) for path in (*emulator, *system, *headers)}
    shutil.rmtree(work)
    say("a first start of ONNX Runtime")
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
    _try(Arm64Device(Environment(root, installed), installed.processors[0]), installed.versions["onnxruntime"])
    made, links = digests(root)
    write_json(root / RECORD, msgspec.to_builtins(msgspec.structs.replace(installed, files=made, links=links)))


def _try(device: Arm64Device, version: str) -> None:
    """Raises MissingToolError unless ONNX Runtime is of `version`; Python's compiled files are written."""
    command = [str(device.environment.python), "-S", "-c", "import numpy, onnxruntime; print(onnxruntime.__version__)"]
    with device.folder() as work:
        done = device.run(command, folder=work, env={"PYTHONDONTWRITEBYTECODE": ""}, timeout=START_S)
    if done.stdout.decode(errors="replace").strip() != version:
        raise MissingToolError("ONNX Runtime does not start under emulation", why=f"it {done.how}")
