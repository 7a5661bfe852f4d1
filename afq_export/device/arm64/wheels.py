"""Wheels for aarch64 through this machine's pip, whatever index it is set up with."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from afq_export.device.arm64.pins import Wheel
from afq_export.device.tools import run
from afq_export.errors import MissingToolError

PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


def download(wheel: Wheel, python: str, folder: Path) -> Path:
    """The wheel's file, held to its digest when one is known. Raises MissingToolError."""
    folder.mkdir(parents=True, exist_ok=True)
    pinned = f" --hash=sha256:{wheel.sha256}" if wheel.sha256 else ""
    wanted = folder / f"{wheel.name}.txt"
    wanted.write_text(f"{wheel.name}=={wheel.version}{pinned}\n", encoding="utf-8")
    tag = f"cp{python.replace('.', '')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python, "--abi", tag, "--abi", "abi3", "--abi", "none"]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    command += ["--require-hashes"] if wheel.sha256 else []
    target = folder / wheel.name
    what = f"cannot download the aarch64 wheel of {wheel.name} {wheel.version}"
    run([*command, "--dest", str(target), "--requirement", str(wanted)], what)
    found = sorted(target.glob("*.whl"))
    if len(found) != 1:
        raise MissingToolError(what, why=f"pip gave {len(found)} files")
    return found[0]


def unpack(file: Path, wheel: Wheel, folder: Path) -> None:
    """What `wheel.keep` names, under `folder`."""
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wheel.keep)])
