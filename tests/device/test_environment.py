"""An environment is taken only whole and for the versions that are here; nothing is left where it cannot be made."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from afq_export.device.arm64 import debian, pins, wheels
from afq_export.device.arm64.environment import RECORD, Installed, digests, open_environment
from afq_export.device.arm64.install import install
from afq_export.device.cache import cache_folder
from afq_export.errors import InputError, MissingToolError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that looks installed."""
    root = tmp_path / "arm64"
    for name in ("qemu/qemu-aarch64", "system/usr/bin/python3.11", "site/executorch/lib/libexecutorch.so"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(name)
    (root / "system" / "bin").symlink_to("usr/bin")
    record(root)
    return root


def record(root: Path, **changes: object) -> None:
    files, links = digests(root)
    installed = Installed(
        fingerprint=pins.fingerprint(pins.read_pins()),
        emulator="qemu 10",
        processors=("cortex-a53",),
        python="3.11",
        versions={"onnxruntime": "1.31.1"},
        unpinned=(),
        packages={},
        wheels={},
        files=files,
        links=links,
    )
    (root / RECORD).write_bytes(msgspec.json.encode(msgspec.structs.replace(installed, **changes)))


def test_a_whole_environment_opens(root: Path) -> None:
    environment = open_environment(root)
    assert environment.python.is_file() and environment.emulator.is_file() and environment.headers == root / "headers"
    assert environment.installed.links == {"system/bin": "usr/bin"}


def test_none_is_there(tmp_path: Path) -> None:
    with pytest.raises(MissingToolError, match=r"not installed .*run `afq-export doctor --install arm64`"):
        open_environment(tmp_path)


@pytest.mark.parametrize("change", ["changed", "removed", "added", "linked"])
def test_a_change_is_seen(root: Path, change: str) -> None:
    file = root / "qemu" / "qemu-aarch64"
    match change:
        case "changed":
            file.write_text("other")
        case "removed":
            file.unlink()
        case "added":
            file = root / "site" / "extra.so"
            file.write_text("")
        case "linked":
            file = root / "system" / "bin"
            file.unlink()
            file.symlink_to("elsewhere")
    with pytest.raises(MissingToolError) as error:
        open_environment(root)
    assert error.value.what == "a file of the arm64 emulation was changed" and error.value.where == str(file)
    assert open_environment(root, check=False)  # what `doctor` asks


def test_of_other_versions(root: Path) -> None:
    record(root, fingerprint="0" * 64)
    with pytest.raises(MissingToolError, match="of other versions"):
        open_environment(root)


def test_a_broken_record(root: Path) -> None:
    (root / RECORD).write_text("{}")
    with pytest.raises(MissingToolError, match="broken"):
        open_environment(root)


def test_the_fingerprint_follows_versions_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pins.read_pins()
    ours = pins.fingerprint(made)
    monkeypatch.setattr(pins, "version", lambda name: "9.9.9+cpu")
    other = pins.read_pins()
    assert pins.fingerprint(other) != ours
    for before, after in zip(made.wheels, other.wheels, strict=True):
        follows = (after.version, after.sha256) == ("9.9.9", "")
        assert follows == before.as_here and (follows or after == before)


def test_every_wheel_is_pinned() -> None:
    table = pins.read_pins()
    assert {wheel.name for wheel in table.wheels} == {"numpy", "onnxruntime", "executorch"}
    assert all(len(wheel.sha256) in (0, 64) for wheel in table.wheels)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AFQ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "afq-export"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "afq-export"
    monkeypatch.setenv("AFQ_CACHE", str(tmp_path / "y"))
    assert cache_folder() == tmp_path / "y"


def program(folder: Path, name: str, script: str) -> None:
    """A program that only tests have."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_without_apt_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    program(tools, "dpkg", "echo amd64")
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(MissingToolError, match="apt-get is not on this machine"):
        install(lambda line: None, tmp_path / "cache" / "arm64")
    assert list((tmp_path / "cache").iterdir()) == []


APT = """
case "$*" in
  indextargets*) printf '%s\\n' 'http://a.invalid/debian main' 'http://b.invalid/debian main' 'http://c.invalid x' ;;
  *update*) grep -q b.invalid "$LIST" || { echo 'E: no Release file' >&2; exit 100; } ;;
esac
"""


def test_the_first_mirror_that_has_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    program(tools, "apt-get", APT)
    program(tools, "dpkg-deb", "")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LIST", str(tmp_path / "state" / "sources.list"))
    assert debian.mirrors() == ["http://a.invalid/debian", "http://b.invalid/debian"]
    suite = debian.open_suite("trixie", "arm64", tmp_path / "state")
    assert (tmp_path / "state" / "sources.list").read_text() == (
        "deb [arch=arm64] http://b.invalid/debian trixie main\n"
    )
    assert f"Dir::State={tmp_path / 'state'}" in suite.options()


def test_no_mirror_has_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    program(tools, "apt-get", APT.replace('b.invalid "', 'z.invalid "'))
    program(tools, "dpkg-deb", "")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LIST", str(tmp_path / "state" / "sources.list"))
    with pytest.raises(MissingToolError, match=r"no package source .* has Debian trixie: E: no Release file"):
        debian.open_suite("trixie", "arm64", tmp_path / "state")


def test_a_wheel_is_held_to_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = pins.Wheel(name="numpy", version="1.2", sha256="a" * 64, keep=("numpy/",))
    asked: list[list[str]] = []

    def run(command: list[str], what: str) -> str:
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "numpy.whl").write_bytes(b"")
        return ""

    monkeypatch.setattr(wheels, "run", run)
    assert wheels.download(wheel, "3.11", tmp_path).name == "numpy.whl"
    assert "--require-hashes" in asked[0] and "cp311" in asked[0] and "--only-binary=:all:" in asked[0]
    assert (tmp_path / "numpy.txt").read_text() == f"numpy==1.2 --hash=sha256:{'a' * 64}\n"


def test_only_arm64_can_be_installed() -> None:
    from afq_export.doctor import install as set_up

    with pytest.raises(InputError, match="nothing to install by that name"):
        set_up("riscv", lambda line: None)
