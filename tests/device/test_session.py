"""The ONNX runner and the session around it, run by this machine's Python in place of the emulated one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from afq_export.device.arm64.pins import ONNX_RUNNER
from afq_export.device.arm64.session import SESSION_OPTIONS, Arm64Session, Limits
from afq_export.errors import InputError, VerdictError
from tests.device.decoders import VOCAB, expected, matmul, save_decoder, table

LOG = "0x{:x}:  4f88e307  sdot     v7.4s, v24.16b, v8.4b[0]\n"


@dataclasses.dataclass(frozen=True)
class Native:
    """What an emulator has, without one. The log has one instruction, in a library that the runtime is not."""

    name: str = "arm64:here"
    environment: SimpleNamespace = dataclasses.field(default_factory=SimpleNamespace)

    @property
    def python(self) -> list[str]:
        return [sys.executable]

    def run(self, command, *, log=None) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise VerdictError("the exported file does not run", where=self.name, why=done.stderr.splitlines()[-1])
        if log:
            log.write_text(
                LOG.format(next(start for name, start, _ in json.loads(done.stdout)["code"] if "libc" in name))
            )
        return done.stdout


def session(folder: Path, prefill: int = 4, **options: object) -> Arm64Session:
    if options:
        (folder / SESSION_OPTIONS).write_text(json.dumps(options))
    return Arm64Session(Native(), folder / "model.onnx", Limits(VOCAB, 64, prefill))


@pytest.fixture
def ids_NT() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, VOCAB, (3, 11)))


@pytest.mark.parametrize("prefill", [1, 4, 11, 64])
def test_logits_do_not_depend_on_how_windows_are_cut(tmp_path: Path, ids_NT: torch.Tensor, prefill: int) -> None:
    save_decoder(tmp_path / "model.onnx")
    ran = session(tmp_path, prefill).run(ids_NT)
    want = np.stack([expected(ids_T) for ids_T in ids_NT.numpy()])
    assert np.array_equal(ran.logits.numpy(), want)
    assert len(ran.seconds) == len(ids_NT) and ran.operators == {}


def test_a_model_without_positions(tmp_path: Path, ids_NT: torch.Tensor) -> None:
    save_decoder(tmp_path / "model.onnx", positions=False)
    assert np.array_equal(session(tmp_path).logits(ids_NT[0]).numpy(), table()[ids_NT[0]])


def test_what_ran_is_read_from_the_profile(tmp_path: Path, ids_NT: torch.Tensor) -> None:
    save_decoder(tmp_path / "model.onnx")
    options = {"graph_optimization_level": "disable", "config": {"session.x64quantprecision": "1"}}
    kernels = session(tmp_path, **options).kernels(ids_NT[0, :9])
    assert {"Gather": 3, "Concat": 3, "Sub": 1}.items() <= kernels.operators.items()
    assert (kernels.family, kernels.instructions) == ("scalar", {})  # nothing was emulated
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", SESSION_OPTIONS]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"providers": ["NnapiExecutionProvider"]}, "this ONNX Runtime has no NnapiExecutionProvider"),
        ({"threads": 4}, "unknown session options: threads"),
        ({"graph_optimization_level": "most"}, "most"),
    ],
)
def test_options_that_cannot_be_kept_are_refused(
    tmp_path: Path, ids_NT: torch.Tensor, options: dict[str, object], said: str
) -> None:
    save_decoder(tmp_path / "model.onnx")
    with pytest.raises(VerdictError, match=said):
        session(tmp_path, **options).run(ids_NT)


def test_linears_come_by_name(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    programs = []
    for name, shape in (("blocks.0.q_proj", (5, 3)), ("lm_head", (4, 6))):
        weight = random.integers(-8, 8, shape).astype(np.float32)
        x = random.integers(-8, 8, (2, shape[0])).astype(np.float32)
        one = SimpleNamespace(program=matmul(weight, name), inputs={name: x}, outputs={name: x @ weight})
        programs.append(one)
    found = session(tmp_path).linears(programs)
    assert [list(outputs) for outputs in found] == [["blocks.0.q_proj"], ["lm_head"]]
    for program, outputs in zip(programs, found, strict=True):
        for name, want in program.outputs.items():
            assert np.array_equal(outputs[name], want)


def test_logits_of_another_vocabulary_are_no_logits(tmp_path: Path, ids_NT: torch.Tensor) -> None:
    save_decoder(tmp_path / "model.onnx")
    other = Arm64Session(Native(), tmp_path / "model.onnx", Limits(VOCAB + 1, 64, 4))
    with pytest.raises(VerdictError, match="logits of shape"):
        other.run(ids_NT)


def test_what_it_cannot_do(tmp_path: Path, ids_NT: torch.Tensor) -> None:
    with pytest.raises(InputError, match="no runtime for this file"):
        Arm64Session(Native(), tmp_path / "model.gguf", Limits(VOCAB, 64, 4))
    save_decoder(tmp_path / "model.onnx")
    with pytest.raises(NotImplementedError):
        session(tmp_path).extend(ids_NT[0], 3)
    with pytest.raises(NotImplementedError):
        session(tmp_path).generate(ids_NT[0], 3, frozenset())


def test_the_runner_needs_nothing_of_this_package() -> None:
    source = ONNX_RUNNER.read_text(encoding="utf-8")
    assert "afq_export" not in source and "torch" not in source
