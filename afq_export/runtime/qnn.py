"""Runs Qualcomm programs through ONNX Runtime's QNN provider: on this machine in its x86 simulator of the HTP.

The host looks token rows and rotary tables up, keeps the KV cache as codes, and calls two static programs: prefill for
many tokens at once, decode for one. No operator may run on the CPU provider: the session refuses to be made then.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from afq_export.errors import InputError, MissingToolError
from afq_export.runtime.onnxruntime import SILENT, first_line, require_onnxruntime
from afq_export.spec.strict import Data

PROVIDER = "QNNExecutionProvider"
INSTALL = 'run `pip install "afq-export[qnn]"`'
FILE, HOST = "model.json", "host.safetensors"


class ValueFile(Data):
    """An input or output: its shape, and its grid with unsigned codes."""

    shape: tuple[int, ...]
    bits: int
    scale: float
    zero_point: int

    @property
    def dtype(self) -> np.dtype:
        """Of its codes."""
        return np.dtype(f"uint{self.bits}")

    def codes(self, values: np.ndarray) -> np.ndarray:
        """Codes of float values: divided, rounded half to even, saturated."""
        steps = np.rint(np.asarray(values, np.float32) / np.float32(self.scale)) + np.float32(self.zero_point)
        return np.clip(steps, 0, (1 << self.bits) - 1).astype(self.dtype)

    def values(self, codes: np.ndarray) -> np.ndarray:
        """Float32 of codes."""
        return (codes.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)


class StepFile(Data):
    """One of the two programs: tokens of a call, inputs and outputs by name."""

    tokens: int
    inputs: dict[str, ValueFile]
    outputs: dict[str, ValueFile]


class HostFile(Data):
    """model.json."""

    context: int
    htp_arch: int
    soc_model: int
    provider: dict[str, str]
    steps: dict[str, StepFile]


def require_qnn() -> Any:
    """The module onnxruntime_qnn. Raises MissingToolError without it."""
    require_onnxruntime()
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        raise MissingToolError("ONNX Runtime's QNN provider is not installed", do=INSTALL)
    import onnxruntime_qnn

    return onnxruntime_qnn


def open_model(path: Path, options: HostFile, entries: Mapping[str, str] = {}) -> Any:
    """A session whose every operator runs on the HTP. `entries`: further session options.

    Raises MissingToolError without the provider, InputError when the HTP does not take the whole graph.
    """
    qnn, runtime = require_qnn(), require_onnxruntime()
    given = runtime.SessionOptions()
    given.intra_op_num_threads, given.log_severity_level = torch.get_num_threads(), SILENT
    given.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in entries.items():
        given.add_session_config_entry(key, value)
    given.add_provider_for_devices(_devices(qnn, runtime), provider_options(options))
    try:
        return runtime.InferenceSession(str(path), sess_options=given)
    except Exception as error:  # ONNX Runtime's own errors have no common base besides it
        raise InputError("the HTP does not take the program", where=path.name, why=first_line(error)) from error


def provider_options(options: HostFile) -> dict[str, str]:
    """Options of the QNN provider: the simulator of the target's HTP."""
    backend = Path(require_qnn().get_library_path()).parent / "libQnnHtp.so"
    return {
        "backend_path": str(backend),
        "htp_arch": str(options.htp_arch),
        "soc_model": str(options.soc_model),
        **options.provider,
    }


def _devices(qnn: Any, runtime: Any) -> list[Any]:
    """The provider's devices; its library is registered once in a process."""

    def found() -> list[Any]:
        return [device for device in runtime.get_ep_devices() if device.ep_name == PROVIDER]

    if not found():
        runtime.register_execution_provider_library(PROVIDER, qnn.get_library_path())
    if not found():
        raise MissingToolError("the QNN provider finds no device", where=PROVIDER, do="take an x86-64 machine")
    return found()


def compile_context(folder: Path, step: str, options: HostFile) -> None:
    """Compiles `<step>.onnx` for the target's HTP: `<step>_ctx.onnx` and `<step>_ctx_qnn.bin` beside it."""
    context = folder / f"{step}_ctx.onnx"
    context.unlink(missing_ok=True)
    entries = {"ep.context_enable": "1", "ep.context_file_path": str(context), "ep.context_embed_mode": "0"}
    open_model(folder / f"{step}.onnx", options, entries)
    if not context.is_file():
        raise InputError("the QNN provider wrote no context", where=context.name)


def write_host_file(folder: Path, file: HostFile) -> None:
    """model.json of a bundle."""
    (folder / FILE).write_text(json.dumps(msgspec.to_builtins(file), indent=1) + "\n", encoding="utf-8")


def read_host_file(folder: Path) -> HostFile:
    """Inverse of `write_host_file`. Raises InputError when the file is missing or does not fit."""
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=HostFile)
    except OSError as error:
        raise InputError("no description of the programs", where=str(path), why=error.strerror or "") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError("the description does not fit", where=str(path), why=str(error)) from error
