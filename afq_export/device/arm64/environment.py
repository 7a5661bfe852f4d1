"""The installed environment: what is in it, whether it is the one that is needed, and whether it is whole.

qemu/qemu-aarch64    the emulator                             system/     Debian's Python, C and C++ libraries for arm64
site/                numpy, onnxruntime, executorch's lib     headers/    ONNX Runtime's C API
installed.json       versions, and the sha256 of every file
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from afq_export.device.arm64.pins import fingerprint, read_pins
from afq_export.device.cache import cache_folder
from afq_export.errors import MissingToolError
from afq_export.files import sha256_file
from afq_export.spec.strict import Data

RECORD = "installed.json"
SET_UP = "run `afq-export doctor --install arm64`"


class Installed(Data, kw_only=True):
    """installed.json. `fingerprint`: see pins.py. `packages`, `wheels`, `files`: name -> sha256.

    `links`: name -> target. `unpinned`: wheels whose digest was not known before they were downloaded.
    """

    fingerprint: str
    emulator: str
    processors: tuple[str, ...]
    python: str
    versions: dict[str, str]
    unpinned: tuple[str, ...]
    packages: dict[str, str]
    wheels: dict[str, str]
    files: dict[str, str]
    links: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Environment:
    """An installed environment in `root`."""

    root: Path
    installed: Installed

    @property
    def emulator(self) -> Path:
        return self.root / "qemu" / "qemu-aarch64"

    @property
    def system(self) -> Path:
        return self.root / "system"

    @property
    def python(self) -> Path:
        return self.system / "usr" / "bin" / f"python{self.installed.python}"

    @property
    def site(self) -> Path:
        return self.root / "site"

    @property
    def headers(self) -> Path:
        return self.root / "headers"


def folder() -> Path:
    """Where the environment is, or would be."""
    return cache_folder() / "arm64"


def open_environment(root: Path | None = None, *, check: bool = True) -> Environment:
    """The environment, every file compared with its digest when `check`.

    Raises MissingToolError when there is none, it was made for other versions, or a file of it was changed.
    """
    root = root or folder()
    environment = Environment(root, _record(root))
    if environment.installed.fingerprint != fingerprint(read_pins()):
        raise MissingToolError(
            "the arm64 emulation is of other versions", where=str(root), why="it does not fit what is here", do=SET_UP
        )
    if check:
        _refuse_changes(environment)
    return environment


def digests(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Of all files under `root` but the record: path -> sha256, and of links path -> target."""
    paths = sorted(path for path in root.rglob("*") if path.name != RECORD)
    files = {str(p.relative_to(root)): sha256_file(p) for p in paths if p.is_file() and not p.is_symlink()}
    links = {str(p.relative_to(root)): str(p.readlink()) for p in paths if p.is_symlink()}
    return files, links


def _record(root: Path) -> Installed:
    path = root / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=Installed)
    except OSError as error:
        raise MissingToolError("the arm64 emulation is not installed", where=str(root), do=SET_UP) from error
    except msgspec.DecodeError as error:
        raise MissingToolError("the arm64 emulation is broken", where=str(path), why=str(error), do=SET_UP) from error


def _refuse_changes(environment: Environment) -> None:
    files, links = digests(environment.root)
    for now, recorded in ((files, environment.installed.files), (links, environment.installed.links)):
        if now == recorded:
            continue
        name = min(key for key in now.keys() | recorded.keys() if now.get(key) != recorded.get(key))
        raise MissingToolError(
            "a file of the arm64 emulation was changed", where=str(environment.root / name), do=SET_UP
        )
