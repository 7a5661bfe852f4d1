"""What every device offers, however it is reached: facts, a folder that goes away again, push, run, pull."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from afq_export.device.tools import last_line
from afq_export.errors import MissingToolError, VerdictError
from afq_export.spec.strict import Data

NOTHING: Mapping[str, str] = MappingProxyType({})
"""No environment variables."""
FREE_MARGIN_MB = 16
"""Of a device's disk stays free: what others write while we do."""


class DeviceFacts(Data):
    """What a device says of itself; sizes in MiB, `free_mb` of the file system that scratch folders are on.

    `python` is the path of a Python 3 there, `onnxruntime` the version it has; both empty where there is none.
    """

    name: str
    kind: str
    """How it is reached: host, arm64, ssh, adb."""
    abi: str
    """Of programs, as uname has it: x86_64, aarch64, armv7l (also for 32-bit programs on a 64-bit kernel)."""
    os: str
    """linux or android, and darwin for a host that is one."""
    processor: str
    cpu_features: tuple[str, ...]
    memory_mb: int
    free_mb: int
    python: str = ""
    onnxruntime: str = ""
    model: str = ""
    """Of the board or phone, empty where none is told."""
    emulated: bool = False
    """Whether it says that it is an emulator."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a program on a device ended: `code` as a shell has it (128 + the signal when one ended it)."""

    code: int
    stdout: bytes
    stderr: str
    signal: int | None = None

    @property
    def how(self) -> str:
        """`ended with exit code 3` or `was killed by SIGSEGV`, and what it said last."""
        how = f"ended with exit code {self.code}"
        if self.signal is not None:
            how = f"was killed by {signal_name(self.signal)}"
        return how + (f" ({last_line(self.stderr, self.code)})" if self.stderr.strip() else "")


class Device(Protocol):
    """A place that runs programs. Paths there are absolute texts, below what `folder` gave.

    Every method raises MissingToolError when the device is not there, not ours to use, gone in the middle, too slow, or
    full. The folder is removed, and what still runs in it is killed, whenever the device still answers.
    """

    @property
    def name(self) -> str:
        """As typed: host, arm64:cortex-a76, ssh:pi@board, adb:SERIAL."""
        ...

    @property
    def emulated(self) -> bool:
        """Whether nothing can be said of its speed."""
        ...

    def facts(self) -> DeviceFacts:
        """What it is; asked once per device object."""
        ...

    def folder(self, keep: bool = False) -> contextlib.AbstractContextManager[str]:
        """A new scratch folder there, removed at the end, also after an error or Ctrl-C, unless `keep`."""
        ...

    def push(self, local: Path, remote: str) -> None:
        """Copies a file there, into folders made as needed; size and sha256 are compared, the execute bit is kept."""
        ...

    def run(self, command: Sequence[str], *, folder: str, env: Mapping[str, str] = NOTHING, timeout: float) -> Finished:
        """Runs a program in `folder` to its end, well or not, with an empty standard input. `timeout` in seconds."""
        ...

    def pull(self, remote: str, local: Path) -> None:
        """Copies a file here: whole (size and sha256 compared) or not at all."""
        ...


def ended_well(device: Device, finished: Finished, what: str) -> Finished:
    """`finished`, of a program that must end well. Raises VerdictError with its signal or exit code and last words."""
    if finished.code == 0 and finished.signal is None:
        return finished
    raise VerdictError(f"{what} failed", where=device.name, why=f"it {finished.how}")


def gone(name: str, why: str, do: str = "") -> MissingToolError:
    """The error of a device that does not answer (any more)."""
    return MissingToolError("device is gone", where=name, why=why, do=do)


def full(name: str, needed: int, free: int | None = None) -> MissingToolError:
    """The error of a device without room for `needed` bytes; `free` bytes where it said so."""
    has = "" if free is None else f", {free / 2**20:.1f} MiB are free"
    return MissingToolError(
        "device is full", where=name, why=f"{needed / 2**20:.1f} MiB are needed{has}", do="free space there"
    )


def signal_name(number: int) -> str:
    """SIGSEGV of 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
