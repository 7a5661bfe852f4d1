"""Runs arm64 programs on one emulated processor."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path

from afq_export.device.arm64.environment import Environment, open_environment
from afq_export.device.tools import last_line
from afq_export.errors import MissingToolError, VerdictError

TIMEOUT_S = 3600.0
"""A program that runs longer is stopped."""


@dataclasses.dataclass(frozen=True)
class Emulator:
    """The environment on processor `cpu`, one of qemu's names. It sees this machine's files under their own paths."""

    environment: Environment
    cpu: str

    @property
    def name(self) -> str:
        """As `--on` has it."""
        return f"arm64:{self.cpu}"

    @property
    def python(self) -> list[str | Path]:
        """What a Python command line begins with. No compiled file is written: the environment stays as it is."""
        return [self.environment.python, "-S", "-B"]

    def start(self, command: Sequence[str | Path], *, log: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Runs an arm64 program to its end, well or not. `log`: where every translated instruction is written.

        It sees nothing of this process' environment variables, which name libraries and modules of another machine.
        Raises VerdictError after TIMEOUT_S.
        """
        place = self.environment
        emulated: list[str | Path] = [place.emulator, "-cpu", self.cpu, "-L", place.system]
        emulated += ["-d", "in_asm", "-D", log] if log else []
        try:
            return subprocess.run(
                list(map(str, [*emulated, *command])),
                env={"PYTHONPATH": str(place.site), "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            why = f"it ran longer than {TIMEOUT_S:.0f} s"
            raise VerdictError("the exported file does not run", where=self.name, why=why) from error

    def run(self, command: Sequence[str | Path], *, log: Path | None = None) -> str:
        """Standard output of a program that must end well. Raises VerdictError with what it says when it does not."""
        done = self.start(command, log=log)
        if done.returncode:
            why = last_line(done.stderr, done.returncode)
            raise VerdictError("the exported file does not run", where=self.name, why=why)
        return done.stdout


def open_emulators(cpus: Sequence[str]) -> tuple[Emulator, ...]:
    """One emulator per processor. Raises MissingToolError when arm64 is not installed, or lacks one of them."""
    environment = open_environment()
    for cpu in cpus:
        if cpu not in environment.installed.processors:
            known = ", ".join(environment.installed.processors)
            raise MissingToolError("this qemu has no such processor", where=cpu, do=f"it has {known}")
    return tuple(Emulator(environment, cpu) for cpu in cpus)
