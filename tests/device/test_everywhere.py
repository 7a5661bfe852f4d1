"""The same session on a real ssh server and behind a real adb server: the same answers, one line for every fault."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from afq_export.device.adb import open_adb
from afq_export.device.arm64.environment import SET_UP
from afq_export.device.build import NATIVE, find_compiler
from afq_export.device.program import Program
from afq_export.device.session import Limits, open_session
from afq_export.device.ssh import open_ssh
from afq_export.device.transport import Device
from afq_export.errors import InputError, MissingToolError, VerdictError
from tests.device.decoders import VOCAB, expected, save_decoder
from tests.device.standins import Standin, adb_server, arm64_environment, arm_runner, board, connect, make_keys, phone
from tests.device.test_session import OPTIONS

pytestmark = pytest.mark.slow
LIMITS = Limits(VOCAB, 64, 4)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    save_decoder(tmp_path / "model.onnx")
    return Program("onnxruntime", (tmp_path / "model.onnx",), OPTIONS)


@pytest.fixture
def ids_NT() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, VOCAB, (2, 11)))


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Device, Standin]]:
    """A board with this machine's Python."""
    keys = make_keys(tmp_path / "keys")
    with board(tmp_path, keys, size="64m") as standin:
        monkeypatch.setenv("AFQ_SSH", f"ssh -F {keys.config}")
        from afq_export.device.remote import Setup

        yield open_ssh("127.0.0.1", Setup(folder=standin.scratch, python=sys.executable)), standin


@pytest.fixture
def android(tmp_path: Path) -> Iterator[tuple[Device, Standin]]:
    """A phone that runs Linux ARM programs."""
    arm64 = arm64_environment()
    if arm64 is None:
        pytest.skip(f"the arm64 emulation is not installed: {SET_UP}")
    with adb_server(tmp_path), phone(tmp_path, "128m", arm64) as standin:
        yield open_adb(connect(standin.port)), standin


def wanted(ids_NT: torch.Tensor) -> np.ndarray:
    return np.stack([expected(ids_T) for ids_T in ids_NT.numpy()])


def test_a_board(linux: tuple[Device, Standin], program: Program, ids_NT: torch.Tensor) -> None:
    device, standin = linux
    with open_session(device, program, LIMITS) as session:
        ran = session.run(ids_NT, prompt=6)
        assert len(standin.left()) == 1
    assert np.array_equal(ran.logits.numpy(), wanted(ids_NT)) and min(ran.decode) > 0
    assert standin.left() == []


def test_a_phone(android: tuple[Device, Standin], program: Program, ids_NT: torch.Tensor, tmp_path: Path) -> None:
    """Without a runner it says which to bring; with one of ours for ARM it computes what is expected."""
    device, standin = android
    assert (device.facts().abi, device.facts().os, device.emulated) == ("aarch64", "android", True)
    with (
        pytest.raises(MissingToolError, match=r"no onnx_runner for android .*--runner"),
        open_session(device, program, LIMITS),
    ):
        pass
    with open_session(device, program, LIMITS, runner=arm_runner("onnxruntime", tmp_path / "runner")) as session:
        ran = session.run(ids_NT, prompt=6)
    assert np.array_equal(ran.logits.numpy(), wanted(ids_NT)) and ran.version
    assert standin.left() == []


def test_a_runner_of_this_machine_on_a_phone(android: tuple[Device, Standin], program: Program) -> None:
    device, standin = android
    own = Path(sys.executable).resolve()
    with pytest.raises(InputError, match="another machine"), open_session(device, program, LIMITS, runner=own):
        pass
    assert standin.left() == []


@pytest.mark.skipif(find_compiler(NATIVE) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise(SIGSEGV);", "its runner was killed by SIGSEGV"),
        (
            'fprintf(stderr, "no memory\\n"); abort();',
            "its runner was killed by SIGABRT (no memory",
        ),
        ("return 7;", "its runner ended with exit code 7"),
    ],
)
def test_a_runner_that_crashes_on_a_board(
    linux: tuple[Device, Standin], program: Program, ids_NT: torch.Tensor, tmp_path: Path, body: str, said: str
) -> None:
    device, standin = linux
    compiler = find_compiler(NATIVE)
    assert compiler
    (tmp_path / "crash").mkdir()
    source, runner = tmp_path / "crash" / "crash.cpp", tmp_path / "crash" / "crash"
    source.write_text(f"#include <csignal>\n#include <cstdio>\n#include <cstdlib>\nint main() {{ {body} return 0; }}\n")
    subprocess.run([*compiler.command, source, "-o", runner], check=True)
    with pytest.raises(VerdictError) as error, open_session(device, program, LIMITS, runner=runner) as session:
        session.run(ids_NT)
    assert said in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 1
    assert standin.left() == []


def test_a_board_that_is_unplugged_while_it_computes(
    linux: tuple[Device, Standin], program: Program, ids_NT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, standin = linux
    with pytest.raises(MissingToolError) as error, open_session(device, program, LIMITS) as session:
        plug = threading.Timer(1.0, standin.pull_the_plug)
        plug.start()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            session.run(ids_NT)
    plug.join()
    assert str(error.value).startswith("device is gone [ssh:127.0.0.1]") and error.value.exit_code == 3
    assert "\n" not in str(error.value)


def test_a_board_that_is_full(linux: tuple[Device, Standin], tmp_path: Path, ids_NT: torch.Tensor) -> None:
    device, standin = linux
    model = tmp_path / "large.onnx"
    model.write_bytes(bytes(100 << 20))
    with (
        pytest.raises(MissingToolError, match=r"device is full \[ssh:127.0.0.1\]: 100.0 MiB are needed"),
        open_session(device, Program("onnxruntime", (model,), OPTIONS), LIMITS),
    ):
        pass
    assert standin.left() == []
