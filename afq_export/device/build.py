"""Builds the runners of exported files, with this machine's compiler or a cross compiler that is only unpacked.

What is built stays in the cache ($AFQ_CACHE/runners) under the digest of all that decides what it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from afq_export.device.cache import cache_folder
from afq_export.device.elf import without_initializers
from afq_export.device.tools import run
from afq_export.files import folder_beside

SOURCES = Path(__file__).parent / "runners"
PTE, ONNX = "pte_runner", "onnx_runner"
CUSTOM_OPERATORS = "extension/llm/custom_ops/libcustom_ops_aot_lib.so"
"""Where ExecuTorch's wheel keeps the kernels of llama::update_cache and llama::custom_sdpa."""
LIBRARIES = (
    "executorch",
    "executorch_threadpool",
    "executorch_kernels_optimized",
    "executorch_kernels_quantized",
    "executorch_backend_xnnpack",
)
"""Of the wheel, free of PyTorch."""
DEFINITIONS = ("C10_USING_CUSTOM_GENERATED_MACROS", "ET_EVENT_TRACER_ENABLED")
"""What the wheel's CMake configuration says that its headers must be compiled with."""
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra")
LINK = ("-Wl,--no-as-needed,--allow-shlib-undefined,-z,lazy", "-Wl,--enable-new-dtags,-rpath,$ORIGIN")
"""Registration alone is no use of a library; what a library of PyTorch's lacks is never called."""
NATIVE, AARCH64 = platform.machine(), "aarch64"


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C++ compiler for programs of `abi`: its command, and folders with the libraries that it needs itself."""

    abi: str
    command: tuple[str, ...]
    libraries: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What a runner is compiled and linked against: headers and libraries for `abi`, of `version`.

    `extra`: see `_extra_library`.
    """

    abi: str
    version: str
    headers: tuple[Path, ...]
    libraries: tuple[Path, ...]
    extra: Path | None = None


def find_compiler(abi: str) -> Compiler | None:
    """This machine's compiler for `abi`."""
    for name in ("g++", "c++", "clang++") if abi == NATIVE else (f"{abi}-linux-gnu-g++",):
        if found := shutil.which(name):
            return Compiler(abi, (found,))
    return None


def unpacked_compiler(root: Path, abi: str) -> Compiler:
    """Debian's cross compiler, unpacked in `root`.

    Its own libraries lie beside it; glibc does not, Debian keeps that in /lib: the machine's is used.
    """
    own = sorted({str(path.parent) for path in root.glob("usr/lib/*/libmpc.so*")})
    return Compiler(abi, (str(root / f"usr/bin/{abi}-linux-gnu-g++"), f"--sysroot={root}"), tuple(own))


def executorch_of(package: Path, abi: str, version: str) -> Runtime:
    """ExecuTorch as its wheel for `abi`, unpacked to `package`, has it."""
    include = package / "include"
    return Runtime(
        abi=abi,
        version=version,
        headers=(include, include / "executorch/runtime/core/portable_type/c10"),
        libraries=tuple(package / "lib" / f"lib{name}.so" for name in LIBRARIES),
        extra=package / CUSTOM_OPERATORS,
    )


def onnxruntime_of(package: Path, headers: Path, abi: str, version: str) -> Runtime:
    """ONNX Runtime as its wheel has it, with headers of Debian's libonnxruntime-dev: its C API is stable."""
    libraries = tuple(sorted((package / "capi").glob("libonnxruntime.so*")))
    return Runtime(abi=abi, version=version, headers=(headers,), libraries=libraries)


def installed_package(name: str) -> Path | None:
    """The folder of a Python package of this machine, without importing it."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def built(name: str, runtime: Runtime) -> Path:
    """Where the runner `name` for `runtime` is, or would be: a folder."""
    digest = hashlib.sha256(repr((name, runtime.abi, FLAGS, DEFINITIONS, LINK)).encode())
    for path in _inputs(name, runtime):
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"-")
    return cache_folder() / "runners" / f"{name}-{runtime.abi}-{digest.hexdigest()[:16]}"


def build(name: str, runtime: Runtime, compiler: Compiler) -> Path:
    """`built`, compiled when it is not there yet. Raises MissingToolError when it does not compile."""
    folder = built(name, runtime)
    if (folder / name).is_file():
        return folder
    with folder_beside(folder) as part:
        libraries = list(runtime.libraries)
        if runtime.extra:
            libraries.append(_extra_library(runtime.extra, part))
        command = [*compiler.command, *FLAGS]
        if name == PTE:
            command += [f"-D{definition}" for definition in DEFINITIONS]
        for headers in runtime.headers:
            command += ["-isystem", str(headers)]
        command += [str(SOURCES / f"{name}.cpp"), "-o", str(part / name)]
        command += [*LINK, *map(str, libraries)]
        environment = {"LD_LIBRARY_PATH": ":".join(compiler.libraries)} if compiler.libraries else {}
        run(command, f"{name} does not build for {runtime.abi}", environment=environment)
    return folder


def _inputs(name: str, runtime: Runtime) -> Iterator[Path]:
    """Files that decide what is built. ONNX Runtime's library is not one: its C API is what counts."""
    yield from (SOURCES / "job.h", SOURCES / f"{name}.cpp")
    if name == PTE:
        yield from (*runtime.libraries[:1], runtime.extra or Path())


def _extra_library(library: Path, folder: Path) -> Path:
    """A copy in `folder` of the library of custom operators, free of PyTorch (see elf.py)."""
    copy = folder / library.name
    copy.write_bytes(
        without_initializers(library.read_bytes(), lambda name: name.startswith(("libtorch", "libc10", "_C.")))
    )
    copy.chmod(0o755)
    return copy
