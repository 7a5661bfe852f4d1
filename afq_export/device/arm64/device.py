"""`arm64:CPU`: this machine's files, programs of another: a device that runs everything under qemu's user emulation."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from afq_export.device.arm64.environment import Environment, open_environment
from afq_export.device.cores import read_cpuinfo
from afq_export.device.host import open_host
from afq_export.device.transport import NOTHING, Device, DeviceFacts, Finished
from afq_export.errors import MissingToolError

START_S = 120.0
"""For a first answer of the emulated processor."""


@dataclasses.dataclass(frozen=True)
class Arm64Device:
    """`Device` (afq_export/device/transport.py): the environment on processor `cpu`, one of qemu's names.

    `log`: where every translated instruction is written.
    """

    environment: Environment
    cpu: str
    log: Path | None = None
    host: Device = dataclasses.field(default_factory=open_host)

    emulated = True

    @property
    def name(self) -> str:
        """As `--device` has it."""
        return f"arm64:{self.cpu}"

    def facts(self) -> DeviceFacts:
        """What it is; the processor as qemu shows it."""
        return self._facts

    @cached_property
    def _facts(self) -> DeviceFacts:
        with self.host.folder() as folder:
            shown = self.run([str(self.environment.python), "-S", "-c", _SHOW], folder=folder, timeout=START_S)
        _, features = read_cpuinfo(shown.stdout.decode(errors="replace"))
        here, versions = self.host.facts(), self.environment.installed.versions
        return DeviceFacts(
            name=self.name,
            kind="arm64",
            abi="aarch64",
            os="linux",
            processor=f"{self.cpu}, emulated",
            cpu_features=features,
            memory_mb=here.memory_mb,
            free_mb=here.free_mb,
            python=str(self.environment.python),
            onnxruntime=versions.get("onnxruntime", ""),
            emulated=True,
        )

    def folder(self, keep: bool = False) -> contextlib.AbstractContextManager[str]:
        """A folder of this machine."""
        return self.host.folder(keep)

    def push(self, local: Path, remote: str) -> None:
        """A copy."""
        self.host.push(local, remote)

    def pull(self, remote: str, local: Path) -> None:
        """A copy."""
        self.host.pull(remote, local)

    def run(self, command: Sequence[str], *, folder: str, env: Mapping[str, str] = NOTHING, timeout: float) -> Finished:
        """Runs an arm64 program. It sees no environment variable of this process: they name another machine's files."""
        place = self.environment
        # Python must not write compiled files: the environment stays as it is.
        own = {"PYTHONPATH": str(place.site), "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8", **env}
        settings = [f"{name}={value}" for name, value in own.items()]
        emulator = [str(place.emulator), "-cpu", self.cpu, "-L", str(place.system)]
        log = ["-d", "in_asm", "-D", str(self.log)] if self.log else []
        return self.host.run(["env", "-i", *settings, *emulator, *log, *command], folder=folder, timeout=timeout)


_SHOW = "print(open('/proc/cpuinfo').read())"


def open_arm64(cpu: str) -> Arm64Device:
    """The emulated processor `cpu`. Raises MissingToolError when arm64 is not installed, changed, or lacks it."""
    environment = open_environment()
    if cpu not in environment.installed.processors:
        known = ", ".join(environment.installed.processors)
        raise MissingToolError("this qemu has no such processor", where=cpu, do=f"it has {known}")
    return Arm64Device(environment, cpu)
