"""What goes to a device: the runner that fits it, with its libraries, or one line that says what is missing."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import pytest

from afq_export.device import build, kit
from afq_export.device.build import NATIVE, PTE, Runtime, built
from afq_export.device.elf import machine_of
from afq_export.device.kit import kit_for
from afq_export.errors import InputError, MissingToolError
from tests.device.test_session import FACTS


def elf(path: Path, machine: int) -> Path:
    path.write_bytes(b"\x7fELF" + bytes(14) + struct.pack("<H", machine))
    return path


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFQ_CACHE", str(tmp_path / "cache"))


def test_machines_are_told_apart(tmp_path: Path) -> None:
    found = [machine_of(elf(tmp_path / str(number), number)) for number in (62, 183, 40, 7)]
    assert found == ["x86_64", "aarch64", "armv7l", "machine 7"]
    assert machine_of(Path(__file__)) == ""
    with pytest.raises(InputError, match="cannot read the program"):
        machine_of(tmp_path / "none")


def test_a_device_with_python_gets_the_script(tmp_path: Path) -> None:
    found = kit_for("onnxruntime", FACTS)
    assert [name for _, name in found.files] == ["onnx_runner.py"]
    assert found.command == ("/usr/bin/python3", "-B", "onnx_runner.py") and found.name == "onnx_runner.py"


def test_a_prebuilt_runner_goes_with_what_lies_beside_it(tmp_path: Path) -> None:
    runner = elf(tmp_path / "mine", 183)
    for name in ("libexecutorch.so", "libonnxruntime.so.1", "notes.txt"):
        (tmp_path / name).write_bytes(b"12345")
    facts = msgspec.structs.replace(FACTS, abi="aarch64", os="android")
    found = kit_for("executorch", facts, runner)
    assert [name for _, name in found.files] == ["mine", "libexecutorch.so", "libonnxruntime.so.1"]
    assert found.command == ("./mine",) and found.size == 20 + 5 + 5


@pytest.mark.parametrize(
    ("facts", "runner", "said"),
    [
        ({"abi": "aarch64"}, "x86", r"another machine .*: it is for x86_64, ssh:fake is aarch64"),
        ({"abi": "aarch64"}, "text", r"another machine .*: it is no ELF program"),
        ({"abi": "aarch64"}, "none", "no such runner"),
    ],
)
def test_a_prebuilt_runner_that_cannot_be_used(tmp_path: Path, facts: dict, runner: str, said: str) -> None:
    elf(tmp_path / "x86", 62)
    (tmp_path / "text").write_text("#!/bin/sh\n" + "#" * 99)
    with pytest.raises(InputError, match=said):
        kit_for("executorch", msgspec.structs.replace(FACTS, **facts), tmp_path / runner)


@pytest.mark.parametrize(
    ("runtime", "facts", "said"),
    [
        ("executorch", {"abi": "aarch64", "os": "android"}, "no pte_runner for android .*device/README.md .* --runner"),
        ("onnxruntime", {"os": "android", "python": ""}, "no onnx_runner for android"),
        ("executorch", {"abi": "riscv64"}, "no executorch for riscv64 on this machine; .* --runner"),
        ("executorch", {"abi": "aarch64"}, "the arm64 emulation is not installed .*doctor --install arm64"),
    ],
)
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, runtime: str, facts: dict, said: str) -> None:
    monkeypatch.setattr(kit, "NATIVE", "x86_64")
    with pytest.raises(MissingToolError, match=said):
        kit_for(runtime, msgspec.structs.replace(FACTS, **facts))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("executorch", reason="needs ExecuTorch's libraries")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingToolError, match=f"pte_runner for {NATIVE} is not built: no compiler for it is here"):
        kit_for("executorch", msgspec.structs.replace(FACTS, abi=NATIVE))


def test_a_built_runner_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And another one is made when a source or a library changes."""
    library = tmp_path / "libexecutorch.so"
    library.write_bytes(b"1")
    against = Runtime(NATIVE, "1.5", (), (library,))
    commands: list[list[str]] = []

    def compile(command: list[str], what: str, **more: object) -> str:
        commands.append(command)
        Path(command[command.index("-o") + 1]).write_text("program")
        return ""

    monkeypatch.setattr(build, "run", compile)
    compiler = build.Compiler(NATIVE, ("cc",))
    folder = build.build(PTE, against, compiler)
    assert build.build(PTE, against, compiler) == folder == built(PTE, against) and len(commands) == 1
    assert str(library) in commands[0] and "-isystem" not in commands[0]
    library.write_bytes(b"2")
    assert build.build(PTE, against, compiler) != folder and len(commands) == 2


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    against = Runtime(NATIVE, "1.5", (), (tmp_path / "libexecutorch.so",))
    with pytest.raises(MissingToolError, match="pte_runner does not build"):
        build.build(PTE, against, build.Compiler(NATIVE, ("false",)))
    assert not built(PTE, against).exists() and list((tmp_path / "cache" / "runners").iterdir()) == []
