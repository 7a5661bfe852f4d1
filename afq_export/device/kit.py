"""What a device is given to run an exported file with: a runner, and the libraries that it does not have."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from afq_export.device.arm64.environment import SET_UP, open_environment
from afq_export.device.build import (
    AARCH64,
    NATIVE,
    ONNX,
    PTE,
    SOURCES,
    Runtime,
    build,
    built,
    executorch_of,
    find_compiler,
    installed_package,
    onnxruntime_of,
)
from afq_export.device.elf import machine_of
from afq_export.device.transport import DeviceFacts
from afq_export.errors import InputError, MissingToolError

RUNNERS = {"executorch": PTE, "onnxruntime": ONNX}
"""Runtime -> its runner."""
HEADERS = Path("usr/include/onnxruntime")
"""Of ONNX Runtime's C API, in a root that Debian's libonnxruntime-dev is unpacked to."""
NDK = "build one as afq_export/device/README.md says and name it with --runner"


@dataclasses.dataclass(frozen=True)
class Kit:
    """`files`: (file here, its name in the folder there). `command` starts the runner in that folder.

    `version`: of the runtime that goes along, empty where the device or the user brings it.
    """

    files: tuple[tuple[Path, str], ...]
    command: tuple[str, ...]
    version: str = ""

    @property
    def name(self) -> str:
        """The runner's."""
        return self.command[-1].removeprefix("./")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path, _ in self.files)


def kit_for(runtime: str, facts: DeviceFacts, prebuilt: Path | None = None) -> Kit:
    """The runner of `runtime` for a device; `prebuilt` is a user's own, with the libraries that lie beside it.

    Raises InputError when `prebuilt` is none for this device, MissingToolError when there is no runner for it.
    """
    name = RUNNERS[runtime]
    if prebuilt:
        return _prebuilt(prebuilt, facts)
    if runtime == "onnxruntime" and facts.python and facts.onnxruntime:
        script = SOURCES / "onnx_runner.py"
        return Kit(((script, script.name),), (facts.python, "-B", script.name))
    if facts.os != "linux":
        raise MissingToolError(f"no {name} for {facts.os}", where=facts.name, why="none is shipped", do=NDK)
    against = runtime_of(runtime, facts.abi)
    folder = runner_folder(name, against)
    files = [(path, path.name) for path in sorted(folder.iterdir())]
    files += [(path, _loaded_as(path)) for path in against.libraries]
    return Kit(tuple(files), (f"./{name}",), against.version)


def runtime_of(runtime: str, abi: str) -> Runtime:
    """Headers and libraries of a runtime for `abi`. Raises MissingToolError where they are not on this machine."""
    package: Path | None = None
    do, number = NDK, ""
    if abi == NATIVE:
        package, do = installed_package(runtime), f"run `pip install {runtime}`"
        number = version(runtime) if package else ""
    elif abi == AARCH64:
        environment = open_environment(check=False)
        package, do = environment.site / runtime, SET_UP
        number = environment.installed.versions.get(runtime, "")
    if package is None or not package.is_dir():
        raise MissingToolError(f"no {runtime} for {abi} on this machine", do=do)
    if runtime == "executorch":
        return executorch_of(package, abi, number)
    headers = next((root / HEADERS for root in _header_roots() if (root / HEADERS).is_dir()), None)
    if headers is None:
        do = f"{SET_UP}, install libonnxruntime-dev, or have Python with onnxruntime there"
        raise MissingToolError("no headers of ONNX Runtime on this machine", do=do)
    return onnxruntime_of(package, headers, abi, number)


def _header_roots() -> Iterator[Path]:
    """Where Debian's libonnxruntime-dev may be: its headers are the same for every machine."""
    with contextlib.suppress(MissingToolError):
        yield open_environment(check=False).headers
    yield Path("/")


def runner_folder(name: str, against: Runtime) -> Path:
    """The folder with the runner, built when it is not in the cache. Raises MissingToolError without a compiler."""
    folder = built(name, against)
    if (folder / name).is_file():
        return folder
    compiler = find_compiler(against.abi)
    if compiler is None:
        do = SET_UP if against.abi == AARCH64 != NATIVE else "install a C++ compiler, or name a runner with --runner"
        raise MissingToolError(f"{name} for {against.abi} is not built", why="no compiler for it is here", do=do)
    return build(name, against, compiler)


def _prebuilt(path: Path, facts: DeviceFacts) -> Kit:
    if not path.is_file():
        raise InputError("no such runner", where=str(path))
    machine = machine_of(path)
    if machine != facts.abi:
        raise InputError(
            "the runner is for another machine",
            where=str(path),
            why=f"it is for {machine}, {facts.name} is {facts.abi}" if machine else "it is no ELF program",
        )
    beside = [(library, library.name) for library in sorted(path.parent.glob("*.so*")) if library != path]
    return Kit(((path, path.name), *beside), (f"./{path.name}",))


def _loaded_as(library: Path) -> str:
    """The name that the loader asks for: libx.so.1 of libx.so.1.31.1."""
    stem, mark, version = library.name.partition(".so.")
    return f"{stem}.so.{version.split('.')[0]}" if mark else library.name


def missing_for(abi: str) -> Iterator[tuple[str, str]]:
    """(runner, what it lacks) for every runner that cannot be given to a Linux device of `abi`."""
    for runtime, name in RUNNERS.items():
        try:
            folder = built(name, against := runtime_of(runtime, abi))
        except MissingToolError as error:
            yield name, error.what
            continue
        if not (folder / name).is_file() and find_compiler(against.abi) is None:
            yield name, f"it is not built, and no compiler for {abi} is here"
