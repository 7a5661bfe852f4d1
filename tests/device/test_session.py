"""A program on a device: this machine with ONNX Runtime's Python, and devices that go wrong in every way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from afq_export.device.build import NATIVE, SOURCES
from afq_export.device.host import open_host
from afq_export.device.program import Program
from afq_export.device.remote import Setup
from afq_export.device.session import (
    DeviceSession,
    Limits,
    LinearProgram,
    WindowSession,
    open_session,
)
from afq_export.device.transport import DeviceFacts, Finished
from afq_export.errors import InputError, MissingToolError, VerdictError
from afq_export.runtime.onnxruntime import RunOptions
from tests.device.decoders import VOCAB, expected, matmul, save_decoder, table

OPTIONS = RunOptions({"graph_optimization_level": "all"})


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where the host's scratch folders go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def opened(tmp_path: Path, scratch: Path):
    """Opens a session of the known decoder on this machine."""

    @contextlib.contextmanager
    def start(
        prefill: int = 4, positions: bool = True, keep: bool = False, **options: object
    ) -> Iterator[DeviceSession]:
        model = tmp_path / "model.onnx"
        save_decoder(model, positions=positions)
        program = Program("onnxruntime", (model,), dataclasses.replace(OPTIONS, **options))
        device = open_host(Setup(folder=str(scratch)))
        with open_session(device, program, Limits(VOCAB, 64, 4), keep=keep) as session:
            yield session

    return start


@pytest.fixture
def ids_NT() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, VOCAB, (3, 11)))


def wanted(ids_NT: torch.Tensor) -> np.ndarray:
    return np.stack([expected(ids_T) for ids_T in ids_NT.numpy()])


def test_logits_do_not_depend_on_how_windows_are_cut(opened, scratch: Path, ids_NT: torch.Tensor) -> None:
    with opened() as session:
        for call, prompt in ((1, 11), (4, 11), (64, 11), (4, 6), (64, 1)):
            ran = session.run(ids_NT, call=call, prompt=prompt)
            assert np.array_equal(ran.logits.numpy(), wanted(ids_NT)), (call, prompt)
            assert len(ran.prefill) == len(ran.decode) == len(ids_NT) and min(ran.prefill) > 0
            assert (min(ran.decode) > 0) == (prompt < 11) and ran.load > 0 and ran.memory > 1
        assert os.listdir(scratch)
    assert os.listdir(scratch) == []


def test_losses_and_choices_are_those_of_the_logits(opened, ids_NT: torch.Tensor) -> None:
    with opened() as session:
        ran = session.run(ids_NT, prompt=5, logits=False)
        bare = session.run(ids_NT, logits=False, scores=False)
    logits_NTV = torch.from_numpy(wanted(ids_NT))[:, :-1].double()
    losses = -logits_NTV.log_softmax(-1).gather(-1, ids_NT[:, 1:, None])[..., 0]
    assert ran.logits is None and torch.allclose(ran.losses, losses, rtol=0, atol=1e-12)
    assert torch.equal(ran.choices, logits_NTV.argmax(-1))
    assert bare.logits is None and bare.losses.numel() == bare.choices.numel() == 0


def test_a_model_without_positions(opened, ids_NT: torch.Tensor) -> None:
    with opened(positions=False) as session:
        assert np.array_equal(session.run(ids_NT).logits.numpy(), table()[ids_NT.numpy()])


def test_what_ran_is_read_from_the_profile(opened, ids_NT: torch.Tensor) -> None:
    entry = {"graph_optimization_level": "disable", "session.x64quantprecision": "1"}
    with opened(session=entry) as session:
        kernels = session.kernels(ids_NT[0, :9])
    assert {"Gather": 3, "Concat": 3, "Sub": 1}.items() <= kernels.operators.items()
    assert (kernels.family, kernels.instructions) == ("unknown", {})  # nothing counts instructions here


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"providers": ("NnapiExecutionProvider",)}, "this ONNX Runtime has no NnapiExecutionProvider"),
        ({"session": {"graph_optimization_level": "most"}}, "no such optimization level: most"),
    ],
)
def test_options_that_cannot_be_kept_are_refused(opened, ids_NT: torch.Tensor, options: dict, said: str) -> None:
    with opened(**options) as session, pytest.raises(VerdictError, match=said):
        session.run(ids_NT)


def test_linears_come_by_name(opened) -> None:
    random = np.random.default_rng(2)
    programs = []
    for name, shape in (("blocks.0.q_proj", (5, 3)), ("lm_head", (4, 6))):
        weight = random.integers(-8, 8, shape).astype(np.float32)
        x = random.integers(-8, 8, (2, shape[0])).astype(np.float32)
        programs.append(LinearProgram(matmul(weight, name), {name: x}, {name: x @ weight}, {name: 0.0}))
    with opened() as session:
        found = session.linears(programs)
    assert [list(outputs) for outputs in found] == [["blocks.0.q_proj"], ["lm_head"]]
    for program, outputs in zip(programs, found, strict=True):
        for name, want in program.outputs.items():
            assert np.array_equal(outputs[name], want)


def test_logits_of_another_vocabulary_are_no_logits(opened, scratch: Path, ids_NT: torch.Tensor) -> None:
    with opened() as session:
        other = dataclasses.replace(session, limits=Limits(VOCAB + 1, 64, 4))
        with pytest.raises(VerdictError, match=r"logits of 231 values, not of shape \(3, 11, 8\)"):
            other.run(ids_NT)


def test_windows_are_asked_for_in_batches(opened, ids_NT: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afq_export.device.session.BATCH_BYTES", 2 * 11 * VOCAB * 4)
    with opened() as session:
        asked = WindowSession(session, ids_NT)
        found = [asked.logits(ids_T).numpy() for ids_T in ids_NT]
    assert np.array_equal(np.stack(found), wanted(ids_NT)) and asked.version


def test_what_is_kept_is_the_whole_job(opened, scratch: Path, ids_NT: torch.Tensor) -> None:
    with opened(keep=True) as session:
        session.run(ids_NT)
    (folder,) = scratch.iterdir()
    assert {"job", "ids", "model.onnx", "onnx_runner.py", "logits", "losses"} <= set(os.listdir(folder))
    assert "prompt 11\n" in (folder / "job").read_text()


def test_the_runner_needs_nothing_of_this_package() -> None:
    source = (SOURCES / "onnx_runner.py").read_text(encoding="utf-8")
    assert "afq_export" not in source and "torch" not in source


@dataclasses.dataclass
class Fake:
    """A device whose programs end as told; `cleaned` says whether its folder went away."""

    finished: Finished
    facts_: DeviceFacts
    name: str = "ssh:fake"
    emulated: bool = False
    cleaned: bool = False

    def facts(self) -> DeviceFacts:
        return self.facts_

    @contextlib.contextmanager
    def folder(self, keep: bool = False) -> Iterator[str]:
        try:
            yield "/scratch"
        finally:
            self.cleaned = not keep

    def push(self, local: Path, remote: str) -> None:
        assert local.is_file() and remote.startswith("/scratch/")

    def run(self, command, *, folder, env, timeout) -> Finished:
        return self.finished

    def pull(self, remote: str, local: Path) -> None:
        raise VerdictError("a program left no such file", where=self.name, why=remote)


FACTS = DeviceFacts(
    name="ssh:fake",
    kind="ssh",
    abi=NATIVE,
    os="linux",
    processor="x",
    cpu_features=(),
    memory_mb=100,
    free_mb=100,
    python="/usr/bin/python3",
    onnxruntime="1.31.1",
)
ANSWER = json.dumps({"load": 1.0, "prefill": [1.0], "decode": [0.0], "memory": 5.0, "code": []}).encode()


@pytest.mark.parametrize(
    ("finished", "error", "said"),
    [
        (Finished(139, b"", "", 11), VerdictError, "its runner was killed by SIGSEGV"),
        (Finished(137, b"", "Killed", 9), VerdictError, "its runner was killed by SIGKILL (Killed)"),
        (Finished(3, b"", "the program does not load: 0x20\n"), VerdictError, "the program does not load: 0x20"),
        (Finished(1, b"", "ImportError: no numpy"), VerdictError, "ended with exit code 1 (ImportError: no numpy)"),
        (Finished(127, b"", "sh: x: not found"), MissingToolError, "the runner does not start [ssh:fake]: sh: x: not"),
        (Finished(126, b"", "Exec format error"), MissingToolError, "Exec format error; give one made for it with"),
        (Finished(0, b"hello", ""), VerdictError, "its runner says 'hello'"),
        (Finished(0, b"[1]", ""), VerdictError, "its runner says '[1]'"),
        (Finished(0, ANSWER, ""), VerdictError, "a program left no such file"),
    ],
)
def test_a_runner_that_fails_is_one_line_and_the_device_is_clean(
    tmp_path: Path, ids_NT: torch.Tensor, finished: Finished, error: type, said: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    program = Program("onnxruntime", (tmp_path / "model.onnx",), OPTIONS)
    device = Fake(finished, FACTS)
    with pytest.raises(error) as raised, open_session(device, program, Limits(VOCAB, 64, 4)) as session:  # type: ignore[arg-type]
        session.run(ids_NT)
    assert said in str(raised.value) and "\n" not in str(raised.value) and device.cleaned


def test_a_full_device_is_told_before_anything_is_copied(tmp_path: Path, ids_NT: torch.Tensor) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(bytes(3 << 20))
    program = Program("onnxruntime", (model,), OPTIONS)
    device = Fake(Finished(0, ANSWER, ""), msgspec.structs.replace(FACTS, free_mb=2))
    with pytest.raises(MissingToolError, match="device is full"), open_session(device, program, Limits(9, 9, 9)):  # type: ignore[arg-type]
        pass
    device.facts_ = msgspec.structs.replace(FACTS, free_mb=4)
    with (
        pytest.raises(MissingToolError, match="device is full"),
        open_session(device, program, Limits(10**6, 64, 4)) as session,  # type: ignore[arg-type]
    ):
        session.run(ids_NT)
    assert device.cleaned


def test_a_runner_for_another_machine_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    program = Program("onnxruntime", (tmp_path / "model.onnx",), OPTIONS)
    device = Fake(Finished(0, ANSWER, ""), msgspec.structs.replace(FACTS, abi="riscv64"))
    own = Path("/proc/self/exe").resolve()
    with (
        pytest.raises(InputError, match="the runner is for another machine"),
        open_session(device, program, Limits(9, 9, 9), runner=own),  # type: ignore[arg-type]
    ):
        pass
