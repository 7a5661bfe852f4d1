"""The machine: what it has, how fast it is, and the one place where torch is told how to compute on it."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from afq_export.errors import InputError, MissingToolError
from afq_export.spec.strict import Data

if TYPE_CHECKING:
    from torch import Tensor

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "neon", "asimd", "asimddp", "i8mm", "sve")
"""Instruction sets that integer kernels choose between."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's malloc.h."""
KEPT_BYTES, MAPPED_BYTES = 256 << 20, 32 << 20
"""What stays at the end of the heap, and the size from which a tensor is mapped by itself: the most that glibc comes to
on its own."""
PROBE_SIZE = 512
"""Rows and columns of the matrices that the speed is measured on."""


def cores() -> int:
    """Processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity
        return os.cpu_count() or 1


def default_threads() -> int:
    """OMP_NUM_THREADS when it says a number, else the cores."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else cores()


def memory_mb() -> float | None:
    """Installed memory in MB, None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (AttributeError, ValueError, OSError):
        return None


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (Linux counts it in KiB)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def resident_mb() -> float:
    """Resident memory of this process now, in MB; where the system does not say, the most that it has been."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return peak_rss_mb()
    return pages * resource.getpagesize() / 1e6


def cpu_name() -> str:
    """The processor's name, or its architecture."""
    return _cpuinfo().get("model name", platform.machine())


def cpu_flags() -> tuple[str, ...]:
    """Those of CPU_FLAGS that the processor has (Linux only)."""
    facts = _cpuinfo()
    words = set(f"{facts.get('flags', '')} {facts.get('Features', '')}".split())
    return tuple(flag for flag in CPU_FLAGS if flag in words)


def processor(asked: str, processes: int = 1) -> str:
    """What torch learns on: `cuda` where `asked` is `auto` or `cuda` and there is a GPU. Raises MissingToolError, and
    InputError for a GPU that several processes were to share: gloo, through which they talk, knows no GPU."""
    import torch

    usable = torch.cuda.is_available() and processes == 1
    if asked == "cpu" or (asked == "auto" and not usable):
        return "cpu"
    where, do = f"--device {asked}", "take --device cpu, or auto"
    if not torch.cuda.is_available():
        raise MissingToolError("no such device", where=where, why="torch finds no CUDA GPU here", do=do)
    if processes > 1:
        raise InputError("no GPU for several processes", where=where, why=f"{processes} processes calibrate", do=do)
    return "cuda"


def settle(threads: int) -> None:
    """Makes torch compute the same bits whenever it computes the same thing with `threads` threads.

    Random numbers are not set here: every stage draws from a generator of its own, seeded by the job.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it a GPU refuses to be deterministic
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over every new tensor, and nothing reads it
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(False)
    keep_memory()


def keep_memory() -> None:
    """Lets the allocator keep what a learning step frees for the next one (glibc only): else a tenth of the time goes
    to the system, for pages that are given back and taken again. It stays so; what is free at the end of a stage is
    given back by `give_back_memory`."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def give_back_memory() -> None:
    """Returns what is free between allocations to the system (glibc only): the next stage would stand on top of it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


class Speed(Data):
    """Products of matrices in 10^9 operations a second, in each precision that a recipe may ask for."""

    float32: float
    bfloat16: float


def measured_speed(seconds: float = 0.3) -> Speed:
    """Speed of torch's matmuls with its present threads, half of the time for each precision.

    The fastest product counts: whatever else the machine does now makes the others slower. Bfloat16 is as slow as a
    processor without instructions for it makes it.
    """
    import torch

    shape = PROBE_SIZE, PROBE_SIZE
    probes = (torch.ones(shape, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    return Speed(*(_gflops(probe, seconds / 2) for probe in probes))


def _gflops(a: Tensor, seconds: float) -> float:
    """Of the square matrix `a` by itself."""
    a @ a
    start, least = time.perf_counter(), math.inf
    while (now := time.perf_counter()) - start < seconds:
        a @ a
        least = min(least, time.perf_counter() - now)
    return round(2 * PROBE_SIZE**3 / least / 1e9, 1)


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
