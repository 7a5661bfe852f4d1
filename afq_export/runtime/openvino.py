"""Runs exported OpenVINO programs on this machine, with the properties that they were lowered for."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from afq_export.errors import InputError, MissingToolError
from afq_export.runtime.session import check_ids, greedy
from afq_export.spec.strict import Data

if TYPE_CHECKING:
    import openvino

INSTALL = 'run `pip install "afq-export[openvino]"`'
LAYERS, PRECISION, KERNEL, ORIGINS = "layerType", "runtimePrecision", "primitiveType", "originalLayersNames"
"""What a compiled program says of its nodes."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a program is run: device, properties that may change the arithmetic, longest sequence, tokens of a call."""

    properties: Mapping[str, str]
    device: str = "CPU"
    context: int = 2048
    prefill: int = 512


@dataclasses.dataclass(frozen=True)
class RanNode:
    """A node of a compiled program: its type, the precision that it runs in, its kernel."""

    type: str
    precision: str
    kernel: str


class OpenvinoSession:
    """`Session` of a program that `lower_openvino` made; the KV cache is the program's state.

    Raises MissingToolError without OpenVINO or its device, InputError when the file is missing, broken, or another
    model.
    """

    def __init__(self, path: Path, options: RunOptions) -> None:
        self._path, self._compiled = path, compiled(path, options)
        inputs = {name for port in self._compiled.inputs for name in port.names}
        outputs = {name: port for port in self._compiled.outputs for name in port.names}
        if "logits" not in outputs or not {"input_ids", "beam_idx"} <= inputs:
            raise InputError("not a decoder of this package", where=str(path), why="no logits, input_ids or beam_idx")
        self._positions, self._seen = "position_ids" in inputs, 0
        self._request = self._compiled.create_infer_request()
        self.vocab = outputs["logits"].get_partial_shape()[2].get_length()
        self.context, self.prefill = options.context, min(options.prefill, options.context)

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 [T, V] of a sequence from position 0 (see `Session`)."""
        return self.extend(ids, 0)

    def extend(self, ids: Tensor, position: int) -> Tensor:
        """Float32 [T, V] of tokens after `position` others (see `Session`)."""
        check_ids(self, self._path, ids, position)
        self._go_back(position)
        rows = [self._call(part) for part in ids.split(self.prefill)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def generate(self, ids: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
        """Greedy continuation (see `Session`)."""
        return greedy(self, ids, tokens, stop)

    def nodes(self) -> dict[str, RanNode]:
        """What the compiled program runs, by the names of the file's operators that went into each node."""
        return ran_nodes(self._compiled)

    def _go_back(self, position: int) -> None:
        """Forgets all tokens from `position` on."""
        if position > self._seen:
            raise InputError("tokens after others that were not seen", why=f"position {position}, {self._seen} seen")
        if not position:
            self._request.reset_state()
        elif position < self._seen:
            import openvino

            for state in self._request.query_state():
                state.state = openvino.Tensor(np.ascontiguousarray(state.state.data[:, :, :position]))
        self._seen = position

    def _call(self, ids: Tensor) -> Tensor:
        past, tokens = self._seen, len(ids)
        feed = {"input_ids": ids.to(torch.long).numpy()[None], "beam_idx": np.zeros(1, np.int32)}
        feed["attention_mask"] = np.ones((1, past + tokens), np.int64)
        if self._positions:
            feed["position_ids"] = np.arange(past, past + tokens)[None]
        try:
            results = self._request.infer(feed)
        except RuntimeError as error:
            raise InputError("the program does not run", where=str(self._path), why=last_line(error)) from error
        self._seen = past + tokens
        return torch.from_numpy(results["logits"][0].copy())


def compiled(model: Path | openvino.Model, options: RunOptions) -> openvino.CompiledModel:
    """A program compiled for its device, with as many threads as torch has. Raises as OpenvinoSession does."""
    core = require_device(options.device)
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()} if options.device == "CPU" else {}
    opened = read_model(model) if isinstance(model, Path) else model
    try:
        return core.compile_model(opened, options.device, {**options.properties, **threads})
    except RuntimeError as error:
        where = str(model) if isinstance(model, Path) else "a model in memory"
        raise InputError("cannot compile the program", where=where, why=last_line(error)) from error


def read_model(path: Path) -> openvino.Model:
    """The program at `path` as it is, nothing changed or fused. Raises InputError when it is none."""
    runtime = require_openvino()
    if not path.is_file():
        raise InputError("no program", where=str(path))
    if b"<net" not in path.read_bytes()[:1000]:  # every other reader of OpenVINO tries a broken file, and says so
        raise InputError("not an OpenVINO program", where=str(path), why="it does not begin with <net>")
    try:
        return runtime.Core().read_model(path)
    except RuntimeError as error:
        raise InputError("cannot read the program", where=str(path), why=last_line(error)) from error


def ran_nodes(program: openvino.CompiledModel) -> dict[str, RanNode]:
    """Name of an operator in the file -> the compiled node that it went into."""
    found = {}
    for node in program.get_runtime_model().get_ops():
        info = {
            key: value.astype(str)
            for key, value in node.get_rt_info().items()
            if key in (LAYERS, PRECISION, KERNEL, ORIGINS)
        }
        ran = RanNode(info.get(LAYERS, ""), info.get(PRECISION, ""), info.get(KERNEL, ""))
        found |= {name: ran for name in info.get(ORIGINS, "").split(",") if name}
    return found


def require_openvino() -> Any:
    """The module. Raises MissingToolError when it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise MissingToolError("OpenVINO is not installed", do=INSTALL)
    import openvino

    return openvino


def require_device(device: str) -> openvino.Core:
    """OpenVINO's core. Raises MissingToolError when the device is not on this machine."""
    core = require_openvino().Core()
    if device not in core.available_devices:
        there = ", ".join(core.available_devices) or "none"
        raise MissingToolError("OpenVINO has no such device here", where=device, why=f"there are: {there}")
    return core


class OptionsFile(Data):
    """What openvino_properties.json holds."""

    device: str
    properties: dict[str, str]
    context_length: Annotated[int, Meta(ge=1)]
    prefill_length: Annotated[int, Meta(ge=1)]


def write_options(path: Path, options: RunOptions) -> None:
    """openvino_properties.json of a bundle."""
    file = OptionsFile(options.device, dict(options.properties), options.context, options.prefill)
    path.write_text(json.dumps(msgspec.to_builtins(file), indent=1) + "\n", encoding="utf-8")


def read_options(path: Path) -> RunOptions:
    """Inverse of `write_options`. Raises InputError when the file is missing or does not fit."""
    try:
        file = msgspec.json.decode(path.read_bytes(), type=OptionsFile)
    except OSError as error:
        raise InputError("no properties", where=str(path), why=error.strerror or str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError("the properties do not fit", where=str(path), why=str(error)) from error
    return RunOptions(file.properties, file.device, file.context_length, file.prefill_length)


def last_line(error: Exception) -> str:
    """What OpenVINO says went wrong, without the places in its source that it lists before."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
