"""ExecuTorch's Python packages: found or named as missing, and started without their noise."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

from afq_export.errors import MissingToolError


def require_executorch() -> None:
    """Raises MissingToolError when ExecuTorch is not installed."""
    if importlib.util.find_spec("executorch") is None:
        raise MissingToolError("ExecuTorch is not installed", do='run `pip install "executorch>=1.5,<1.6"`')


def require_coremltools() -> None:
    """Raises MissingToolError when coremltools is not installed."""
    if importlib.util.find_spec("coremltools") is None:
        raise MissingToolError("coremltools is not installed", do='run `pip install "afq-export[coreml]"`')


@functools.cache
def load_coremltools() -> ModuleType:
    """coremltools, without what it says of runtimes that this system cannot have. Raises MissingToolError."""
    require_coremltools()
    with quiet():
        import coremltools
    return coremltools


@functools.cache
def load_runtime() -> ModuleType:
    """ExecuTorch's `portable_lib`, with the operators that our programs call, its exporter and its threads started.

    Operators must be registered before a program that calls them is traced or loaded, hence the one place.
    Raises MissingToolError when ExecuTorch is not installed.
    """
    require_executorch()
    with quiet():
        import executorch.exir
        import executorch.kernels.quantized  # noqa: F401  (quantized_decomposed::embedding_*)
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (llama::update_cache, custom_sdpa)
        from executorch.extension.pybindings import portable_lib

        portable_lib._threadpool_get_thread_count()
    return portable_lib


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing reaches standard error: for libraries that report on themselves while they are imported or started.

    File descriptor 2, because part of it is written by C++. Exceptions pass.
    """
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
