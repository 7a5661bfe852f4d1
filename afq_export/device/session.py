"""An exported file on a device, whatever it is: pushed once, then asked for logits, losses, linears and times."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from afq_export.device.arm64.device import Arm64Device
from afq_export.device.arm64.instructions import count_instructions, family_of
from afq_export.device.kit import Kit, kit_for
from afq_export.device.program import Program
from afq_export.device.tools import last_line
from afq_export.device.transport import Device, DeviceFacts, Finished, full
from afq_export.errors import MissingToolError, VerdictError
from afq_export.runtime.profile import executed_nodes

TIMEOUT_S = 3600.0
"""A runner that takes longer is stopped."""
BATCH_BYTES = 1 << 28
"""Logits that lie on a device at a time."""
OWN_CODES = (2, 3, 4)
"""Exit codes with which a runner says in one line what is wrong (runners/job.h)."""
NOT_STARTED = (126, 127)
"""A shell's exit codes for a program that it cannot start."""
UNKNOWN = "unknown"
"""Kernel family where nothing counts instructions."""
LIBRARIES = {
    "executorch": ("libexecutorch_backend_xnnpack",),
    "onnxruntime": ("libonnxruntime", "onnxruntime_pybind11_state"),
}
"""Runtime -> where its linear kernels are."""


@dataclasses.dataclass(frozen=True)
class LinearProgram:
    """A program of linears: `inputs` float32 [T, I] by name, in its order; `outputs` float32 [T, O] on this machine.

    `bounds`: the error that each linear's kernel is allowed, over the largest |output|.
    """

    program: bytes
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    bounds: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the host's session of the same file says: vocabulary, longest sequence, tokens of a call."""

    vocab: int
    context: int
    prefill: int


class Answer(msgspec.Struct, frozen=True):
    """What a runner prints (runners/job.h); for linears it has nothing to time."""

    load: float
    code: tuple[tuple[str, int, int], ...]
    prefill: tuple[float, ...] = ()
    decode: tuple[float, ...] = ()
    memory: float = 0.0
    version: str = ""


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a device gave for windows int64 [N, T].

    `logits` float32 [N, T, V] or None where they were not asked for; `losses` float64 and `choices` int64 [N, T - 1] as
    the device computed them, or empty. Seconds: `load` of the program, `prefill` and `decode` by window. `memory`: the
    peak in MiB. `operators`: executed node types (profiled runs of ONNX Runtime). `code`: executable mappings.
    """

    logits: Tensor | None
    losses: Tensor
    choices: Tensor
    load: float
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    memory: float
    version: str = ""
    operators: Mapping[str, int] = dataclasses.field(default_factory=dict)
    code: tuple[tuple[str, int, int], ...] = ()

    @property
    def given_logits(self) -> Tensor:
        """`logits`, which were asked for."""
        assert self.logits is not None
        return self.logits

    @property
    def seconds(self) -> tuple[float, ...]:
        """By window."""
        return tuple(prompt + rest for prompt, rest in zip(self.prefill, self.decode, strict=True))


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What ran: the family, distinct instructions by name, and (ONNX Runtime) executed node types."""

    family: str
    instructions: Mapping[str, int]
    operators: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class DeviceSession:
    """A program and its runner in `folder` of a device; made by `open_session`."""

    device: Device
    facts: DeviceFacts
    folder: str
    program: Program
    kit: Kit
    limits: Limits
    threads: int

    def run(
        self, ids_NT: Tensor, *, prompt: int | None = None, call: int | None = None, logits: bool = True,
        scores: bool = True, profile: bool = False,
    ) -> Ran:  # fmt: skip
        """All windows int64 [N, T] in one process, each from position 0: the first `prompt` tokens in calls of `call`,
        the others one by one. Raises VerdictError when the file does not run there or gives something else.
        """
        windows, tokens = ids_NT.shape
        job = {
            "model": self.program.model,
            "ids": "ids",
            "windows": windows,
            "tokens": tokens,
            "prompt": prompt or tokens,
            "call": call or self.limits.prefill,
        }
        job |= {"losses": "losses", "choices": "choices"} if scores else {}
        job |= {"logits": "logits"} if logits else {}
        job |= {"profile": "profile"} if profile and self.program.runtime == "onnxruntime" else {}
        needed = ids_NT.numel() * (self.limits.vocab * 4 if logits else 0)
        if needed > self.facts.free_mb * 2**20:
            raise full(self.device.name, needed, self.facts.free_mb * 2**20)
        with self._here() as here:
            (here / "ids").write_bytes(ids_NT.numpy().astype("<i8").tobytes())
            said = self._ask(job, here, ["ids"])
            shape = (windows, tokens, self.limits.vocab)
            given = self._array(here, "logits", "<f4", shape) if logits else None
            predicted = (windows, tokens - 1)
            losses = self._array(here, "losses", "<f8", predicted) if scores else np.empty((0, 0))
            choices = self._array(here, "choices", "<i4", predicted) if scores else np.empty((0, 0))
            operators = self._operators(here) if "profile" in job else {}
        return Ran(
            logits=None if given is None else torch.from_numpy(given),
            losses=torch.from_numpy(losses),
            choices=torch.from_numpy(choices.astype(np.int64)),
            load=said.load,
            prefill=said.prefill,
            decode=said.decode,
            memory=said.memory,
            version=said.version or self.kit.version,
            operators=operators,
            code=said.code,
        )

    def kernels(self, ids_T: Tensor) -> Kernels:
        """What runs for a prompt of all but the last of `ids_T`, and for the last one alone."""
        prompt = len(ids_T) - 1
        if not isinstance(self.device, Arm64Device):
            return Kernels(UNKNOWN, {}, self.run(ids_T[None], prompt=prompt, logits=False, profile=True).operators)
        with tempfile.TemporaryDirectory(prefix="afq-trace-") as folder:
            log = Path(folder) / "instructions"
            logged = dataclasses.replace(self, device=dataclasses.replace(self.device, log=log))
            ran = logged.run(ids_T[None], prompt=prompt, logits=False, profile=True)
            instructions = count_instructions(log, ran.code, LIBRARIES[self.program.runtime])
        return Kernels(family_of(instructions), instructions, ran.operators)

    def linears(self, programs: Sequence[LinearProgram]) -> list[dict[str, np.ndarray]]:
        """Outputs float32 [T, O] by name of each program, all in one process. Raises VerdictError as `run` does."""
        with self._here() as here:
            lines, sent = [], ["list"]
            for index, program in enumerate(programs):
                (here / f"{index}.program").write_bytes(program.program)
                rows = len(next(iter(program.inputs.values())))
                words = [f"{index}.program", f"{index}.out", str(rows)]
                for number, array in enumerate(program.inputs.values()):
                    array.astype("<f4").tofile(here / f"{index}.{number}")
                    words += [f"{index}.{number}", str(array.shape[1])]
                lines.append(" ".join(words) + "\n")
                sent += [words[0], *words[3::2]]
            (here / "list").write_text("".join(lines), encoding="utf-8")
            self._ask({"matrices": "list"}, here, sent)
            return [self._outputs(here, index, program) for index, program in enumerate(programs)]

    def _outputs(self, here: Path, index: int, program: LinearProgram) -> dict[str, np.ndarray]:
        shapes = [program.outputs[name].shape for name in program.inputs]
        sizes = [int(np.prod(shape)) for shape in shapes]
        values = self._array(here, f"{index}.out", "<f4", (sum(sizes),))
        parts = np.split(values, np.cumsum(sizes)[:-1])
        return {name: part.reshape(shape) for name, part, shape in zip(program.inputs, parts, shapes, strict=True)}

    def _ask(self, job: Mapping[str, Any], here: Path, files: Sequence[str]) -> Answer:
        """The runner's answer to a job whose `files` lie in `here`."""
        lines = [f"{key} {value}" for key, value in job.items()]
        lines += [f"threads {self.threads}", *self.program.lines()]
        (here / "job").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for name in (*files, "job"):
            self.device.push(here / name, f"{self.folder}/{name}")
        env = {"LD_LIBRARY_PATH": self.folder} if self.kit.command[0].startswith("./") else {}
        finished = self.device.run([*self.kit.command, "job"], folder=self.folder, env=env, timeout=TIMEOUT_S)
        self._refuse(finished)
        try:
            return msgspec.json.decode(finished.stdout, type=Answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            why = f"its runner says {finished.stdout[:60].decode(errors='replace')!r}"
            raise VerdictError("the exported file does not run", where=self.device.name, why=why) from error

    def _refuse(self, finished: Finished) -> None:
        """Raises VerdictError unless the runner ended well, MissingToolError when it was not even started."""
        if finished.code == 0:
            return
        said = last_line(finished.stderr, finished.code)
        if finished.code in NOT_STARTED:
            raise MissingToolError(
                "the runner does not start", where=self.device.name, why=said, do="give one made for it with --runner"
            )
        why = said if finished.code in OWN_CODES else f"its runner {finished.how}"
        raise VerdictError("the exported file does not run", where=self.device.name, why=why)

    def _array(self, here: Path, name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        """A file of the device as an array. Raises VerdictError when it has another size."""
        self.device.pull(f"{self.folder}/{name}", here / name)
        values = np.fromfile(here / name, kind)
        if values.size != int(np.prod(shape)):
            why = f"{name} of {values.size} values, not of shape {shape}"
            raise VerdictError("the exported file does not run", where=self.device.name, why=why)
        return values.reshape(shape)

    def _operators(self, here: Path) -> dict[str, int]:
        """Executed node types and how many nodes each, of the profile."""
        self.device.pull(f"{self.folder}/profile", here / "profile")
        return executed_nodes((here / "profile").read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def _here(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="afq-device-") as name:
            yield Path(name)


class WindowSession:
    """`Session` for measuring windows int64 [N, T] one after the other: asked of a device in batches of them."""

    def __init__(self, session: DeviceSession, ids_NT: Tensor) -> None:
        self._session, self._ids, self._next = session, ids_NT, 0
        self._rows: list[Tensor] = []
        self.vocab = session.limits.vocab
        self.version = ""

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 [T, V] of the next window, which is `ids`."""
        if not self._rows:
            count = max(1, BATCH_BYTES // (4 * self.vocab * len(ids)))
            ran = self._session.run(self._ids[self._next : self._next + count], scores=False)
            self._rows, self.version = list(ran.given_logits), ran.version
        assert torch.equal(ids, self._ids[self._next])
        self._next += 1
        return self._rows.pop(0)


@contextlib.contextmanager
def open_session(
    device: Device, program: Program, limits: Limits, *, runner: Path | None = None, keep: bool = False,
    threads: int = 1,
) -> Iterator[DeviceSession]:  # fmt: skip
    """`program` and a runner (see kit.py) in a folder of `device` that is removed at the end unless `keep`.

    `threads` 0: as many as the runtime likes. Raises MissingToolError where device or runner are not to be had or the
    device is full, InputError when `runner` is for another machine.
    """
    facts = device.facts()
    kit = kit_for(program.runtime, facts, runner)
    needed = kit.size + program.size
    if needed > facts.free_mb * 2**20:
        raise full(device.name, needed, facts.free_mb * 2**20)
    with device.folder(keep) as folder:
        for path, name in (*kit.files, *((path, path.name) for path in program.files)):
            device.push(path, f"{folder}/{name}")
        yield DeviceSession(device, facts, folder, program, kit, limits, threads)
