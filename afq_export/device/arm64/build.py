"""Builds the runner of .pte programs against ExecuTorch's aarch64 wheel; the cross compiler is only unpacked."""

from __future__ import annotations

from pathlib import Path

from afq_export.device.arm64.elf import without_initializers
from afq_export.device.arm64.pins import RUNNER_SOURCE
from afq_export.device.tools import run

RUNNER = "bin/pte_runner"
"""In the folder of the executorch package."""
CUSTOM_OPERATORS = "extension/llm/custom_ops/libcustom_ops_aot_lib.so"
"""Where the wheel keeps the kernels of llama::update_cache and llama::custom_sdpa."""
LIBRARIES = (
    "executorch",
    "executorch_threadpool",
    "executorch_kernels_optimized",
    "executorch_kernels_quantized",
    "executorch_backend_xnnpack",
    "custom_ops_aot_lib",
)
DEFINITIONS = ("C10_USING_CUSTOM_GENERATED_MACROS", "ET_EVENT_TRACER_ENABLED")
"""What the wheel's CMake configuration says that its headers must be compiled with."""
COMPILER = "usr/bin/aarch64-linux-gnu-g++"


def build_runner(compiler: Path, executorch: Path) -> None:
    """Compiles pte_runner.cpp to RUNNER in `executorch`, the package's folder; it finds its libraries from there.

    `compiler` is the root of the unpacked cross compiler. Raises MissingToolError when it does not build.
    """
    _free_custom_operators(executorch)
    (executorch / RUNNER).parent.mkdir(exist_ok=True)
    include = executorch / "include"
    command = [compiler / COMPILER, f"--sysroot={compiler}", "-std=c++17", "-O2", "-Wall", "-Wextra"]
    command += [f"-D{name}" for name in DEFINITIONS]
    for folder in (include, include / "executorch/runtime/core/portable_type/c10"):
        command += ["-isystem", folder]
    command += [RUNNER_SOURCE, "-o", executorch / RUNNER, f"-L{executorch / 'lib'}"]
    command += ["-Wl,--no-as-needed,--allow-shlib-undefined,-z,lazy"]  # registration alone is no use of a library
    command += [f"-l{name}" for name in LIBRARIES]
    command += ["-Wl,--enable-new-dtags,-rpath,$ORIGIN/../lib"]
    # The compiler's own libraries lie beside it; glibc does not, Debian keeps that in /lib: the machine's is used.
    own = ":".join(sorted({str(path.parent) for path in compiler.glob("usr/lib/*/libmpc.so*")}))
    run(command, "the runner of .pte programs does not build", environment={"LD_LIBRARY_PATH": own})


def _free_custom_operators(executorch: Path) -> None:
    """A copy in `lib` of the library that holds them, free of PyTorch (see elf.py)."""
    name = Path(CUSTOM_OPERATORS).name
    copy = without_initializers(
        (executorch / CUSTOM_OPERATORS).read_bytes(),
        lambda needed: needed.startswith(("libtorch", "libc10", "_C.")),
    )
    (executorch / "lib" / name).write_bytes(copy)
