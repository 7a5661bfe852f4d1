"""`Session` of an exported file on an emulated processor: one process for all windows, as starting takes seconds."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from afq_export.device.arm64.emulator import Emulator
from afq_export.device.arm64.instructions import count_instructions, family_of
from afq_export.device.arm64.pins import ONNX_RUNNER
from afq_export.errors import InputError, VerdictError

RUNTIMES = {".pte": "executorch", ".onnx": "onnxruntime"}
"""Suffix of an exported file -> the runtime that loads it."""
LIBRARIES = {
    "executorch": ("libexecutorch_backend_xnnpack",),
    "onnxruntime": ("libonnxruntime", "onnxruntime_pybind11_state"),
}
"""Runtime -> where its linear kernels are."""
SESSION_OPTIONS = "session_options.json"
"""Beside an ONNX file: how its session is to be opened."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the host's session of the same file says: vocabulary, longest sequence, tokens of a call."""

    vocab: int
    context: int
    prefill: int


class LinearProgram(Protocol):
    """A program of linears: inputs float32 [T, I] by name, in its order, and outputs [T, O] as they are elsewhere."""

    @property
    def program(self) -> bytes: ...

    @property
    def inputs(self) -> Mapping[str, np.ndarray]: ...

    @property
    def outputs(self) -> Mapping[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Ran:
    """Logits float32 [N, T, V], seconds per window, and what the runner saw: executed node types, mapped code."""

    logits: Tensor
    seconds: tuple[float, ...]
    operators: dict[str, int]
    code: tuple[tuple[str, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What ran: the family, distinct instructions by name, and (ONNX Runtime) executed node types."""

    family: str
    instructions: dict[str, int]
    operators: dict[str, int]


class Arm64Session:
    """`Session` (afq_export/runtime/session.py) of `model`, a .pte or .onnx file. Raises InputError for any other."""

    def __init__(self, emulator: Emulator, model: Path, limits: Limits) -> None:
        if model.suffix not in RUNTIMES:
            raise InputError(
                "no runtime for this file on a device", where=str(model), do=f"known: {', '.join(RUNTIMES)}"
            )
        self.emulator, self.model = emulator, model.resolve()
        self.runtime = RUNTIMES[model.suffix]
        self.vocab, self.context, self.prefill = limits.vocab, limits.context, limits.prefill

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 [T, V] of a sequence int64 [T] from position 0."""
        return self.run(ids[None]).logits[0]

    def extend(self, ids: Tensor, position: int) -> NoReturn:
        """Not here: no process lives on from call to call."""
        raise NotImplementedError("an emulated session keeps no state")

    def generate(self, ids: Tensor, tokens: int, stop: frozenset[int]) -> NoReturn:
        """Not here: generation is the host's."""
        raise NotImplementedError("an emulated session does not generate")

    def run(self, ids_NT: Tensor) -> Ran:
        """All windows int64 [N, T] in one process. Raises VerdictError when the file does not run there."""
        return self._run(ids_NT, self.prefill)

    def kernels(self, ids_T: Tensor) -> Kernels:
        """What runs for a prompt of all but the last of `ids_T`, and for the last one alone."""
        with tempfile.TemporaryDirectory(prefix="afq-trace-") as folder:
            log = Path(folder) / "instructions"
            ran = self._run(ids_T[None], len(ids_T) - 1, log)
            instructions = count_instructions(log, ran.code, LIBRARIES[self.runtime])
        return Kernels(family_of(instructions), instructions, ran.operators)

    def linears(self, programs: Sequence[LinearProgram]) -> list[dict[str, np.ndarray]]:
        """Outputs float32 [T, O] by name of each program, all in one process. Raises VerdictError as `run` does."""
        with tempfile.TemporaryDirectory(prefix="afq-linears-") as name:
            folder = Path(name)
            for index, program in enumerate(programs):
                (folder / f"{index}.program").write_bytes(program.program)
            run = self._linears_pte if self.runtime == "executorch" else self._linears_onnx
            return run(programs, folder)

    def _linears_pte(self, programs: Sequence[LinearProgram], folder: Path) -> list[dict[str, np.ndarray]]:
        lines = []
        for index, program in enumerate(programs):
            rows = len(next(iter(program.inputs.values())))
            words = [f"{index}.program", f"{index}.out", str(rows)]
            for number, array in enumerate(program.inputs.values()):
                array.astype("<f4").tofile(folder / f"{index}.{number}")
                words += [f"{index}.{number}", str(array.shape[1])]
            lines.append(" ".join(words) + "\n")
        (folder / "list").write_text("".join(lines), encoding="utf-8")
        self.emulator.run([self.emulator.environment.pte_runner, folder, "list"])
        results = []
        for index, program in enumerate(programs):
            values = np.fromfile(folder / f"{index}.out", "<f4")
            ends = np.cumsum([program.outputs[name].size for name in program.inputs])
            parts = dict(zip(program.inputs, np.split(values, ends[:-1]), strict=True))
            results.append({name: part.reshape(program.outputs[name].shape) for name, part in parts.items()})
        return results

    def _linears_onnx(self, programs: Sequence[LinearProgram], folder: Path) -> list[dict[str, np.ndarray]]:
        wanted = []
        for index, program in enumerate(programs):
            files = [str(folder / f"{index}.{end}") for end in ("program", "in.npz", "out.npz")]
            np.savez(files[1], **{f"{name}.x": array[None] for name, array in program.inputs.items()})
            wanted.append(dict(zip(("model", "inputs", "outputs"), files, strict=True)))
        self._ask_onnx({"programs": wanted}, folder, None)
        results = []
        for program, files in zip(programs, wanted, strict=True):
            with np.load(files["outputs"]) as outputs:
                results.append({name: outputs[f"{name}.y"][0] for name in program.inputs})
        return results

    def _run(self, ids_NT: Tensor, call: int, log: Path | None = None) -> Ran:
        with tempfile.TemporaryDirectory(prefix="afq-arm64-") as name:
            run = self._run_pte if self.runtime == "executorch" else self._run_onnx
            logits, facts = run(ids_NT, call, Path(name), log)
        if logits.shape != (*ids_NT.shape, self.vocab):
            why = f"logits of shape {tuple(logits.shape)} for ids of shape {tuple(ids_NT.shape)}"
            raise VerdictError("the exported file does not run", where=self.emulator.name, why=why)
        return Ran(logits, tuple(facts["seconds"]), facts.get("operators", {}), tuple(map(tuple, facts["code"])))

    def _run_pte(self, ids_NT: Tensor, call: int, folder: Path, log: Path | None) -> tuple[Tensor, dict]:
        ids, logits = folder / "ids", folder / "logits"
        ids.write_bytes(ids_NT.numpy().astype("<i8").tobytes())
        windows, tokens = ids_NT.shape
        runner = self.emulator.environment.pte_runner
        said = self.emulator.run([runner, self.model, ids, logits, str(windows), str(tokens), str(call)], log=log)
        values = np.fromfile(logits, "<f4")
        return torch.from_numpy(values.reshape(windows, tokens, -1)), json.loads(said)

    def _run_onnx(self, ids_NT: Tensor, call: int, folder: Path, log: Path | None) -> tuple[Tensor, dict]:
        request = {
            "model": str(self.model),
            "ids": str(folder / "ids.npy"),
            "logits": str(folder / "logits.npy"),
            "call": call,
            "profile": str(folder / "profile") if log else None,
        }
        np.save(request["ids"], ids_NT.numpy())
        facts = self._ask_onnx(request, folder, log)
        return torch.from_numpy(np.load(request["logits"])), facts

    def _ask_onnx(self, request: dict[str, Any], folder: Path, log: Path | None) -> dict[str, Any]:
        """What onnx_runner.py answers to `request`, with the session options beside the model."""
        options = self.model.with_name(SESSION_OPTIONS)
        whole = request | {"options": str(options) if options.is_file() else None}
        (folder / "request.json").write_text(json.dumps(whole), encoding="utf-8")
        return json.loads(self.emulator.run([*self.emulator.python, ONNX_RUNNER, folder / "request.json"], log=log))
