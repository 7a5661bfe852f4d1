"""`Device` of anything with a POSIX shell, over a link that carries commands and files: local, ssh, adb."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
import secrets
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from afq_export.device import posix
from afq_export.device.process import Output
from afq_export.device.tools import complaint
from afq_export.device.transport import FREE_MARGIN_MB, NOTHING, DeviceFacts, Finished, full, gone
from afq_export.errors import AfqError, InputError, MissingToolError, VerdictError
from afq_export.files import sha256_file, write_beside

ANSWER_S = 30.0
"""A device that has not answered a small question by then is gone."""
RETURN_S = 2.0
"""A device that was lost is asked once more after so long: a loose plug, or adb's server started anew."""
SLOWEST_BYTES_S = 2**18
"""A transfer slower than 256 KiB/s on the whole is given up."""
RESULT_BYTES = 2**25
"""A file that a program left is taken to be of this size, for the time that its digest may take."""
NO_SPACE = ("No space left on device", "Disk quota exceeded")
"""What programs say on a full device, in English as `wrapped` asks for."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a user may know better: where scratch folders go there, and the Python to use; empty for the usual."""

    folder: str = ""
    python: str = ""

    @classmethod
    def of_environment(cls) -> Setup:
        """$AFQ_DEVICE_FOLDER (an absolute path there) and $AFQ_DEVICE_PYTHON. Raises InputError for another path."""
        folder = os.environ.get("AFQ_DEVICE_FOLDER", "")
        if folder and not folder.startswith("/"):
            raise InputError("not an absolute path", where=f"AFQ_DEVICE_FOLDER={folder}")
        return cls(folder, os.environ.get("AFQ_DEVICE_PYTHON", ""))


class Link(Protocol):
    """The way to a device."""

    @property
    def name(self) -> str:
        """As typed."""
        ...

    @property
    def kind(self) -> str:
        """ssh, adb, host."""
        ...

    @property
    def bases(self) -> tuple[str, ...]:
        """Where scratch folders go, best first, as words of a shell."""
        ...

    def shell(self, script: str, timeout: float, stdin: Path | None = None, stdout: Path | None = None) -> Output:
        """Runs a script there. Raises subprocess.TimeoutExpired."""
        ...

    def send(self, local: Path, remote: str, timeout: float) -> str:
        """Copies a file there; what it complained of, which the comparison of sizes and digests decides on."""
        ...

    def fetch(self, remote: str, local: Path, timeout: float) -> str:
        """Copies a file here, as `send` does."""
        ...

    def fault(self, output: Output) -> AfqError:
        """Why a script did not come to its end."""
        ...


class ShellDevice:
    """`Device` (afq_export/device/transport.py) at the end of a link."""

    def __init__(self, link: Link, setup: Setup) -> None:
        self._link = link
        self._bases = (shlex.quote(setup.folder),) if setup.folder else link.bases
        self._python = setup.python or "python3"

    @property
    def name(self) -> str:
        """As typed."""
        return self._link.name

    @property
    def emulated(self) -> bool:
        """Whether it says so itself, as Android's emulator does."""
        return self._facts.emulated

    def facts(self) -> DeviceFacts:
        """What it is; asked once."""
        return self._facts

    @cached_property
    def _facts(self) -> DeviceFacts:
        finished = self._well(posix.ask_facts(self._bases, self._python), "device has no room for us")
        return posix.read_facts(finished.stdout, self.name, self._link.kind)

    @contextlib.contextmanager
    def folder(self, keep: bool = False) -> Iterator[str]:
        """A new scratch folder, removed at the end, also after an error or Ctrl-C, unless `keep`."""
        name = f"afq-{secrets.token_hex(8)}"
        path = self._well(posix.make_folder(self._bases, name), "device has no room for us").stdout.decode()
        if not posix.FOLDER.fullmatch(path):
            raise gone(self.name, f"its shell says {path[:80]!r} for a folder")
        try:
            yield path
        except BaseException as error:
            left = self._leave(path, keep)
            if left and isinstance(error, AfqError):
                do = "; ".join(filter(None, (error.do, left)))
                raise type(error)(error.what, where=error.where, why=error.why, do=do) from error
            raise
        left = self._leave(path, keep)
        if left:
            raise MissingToolError("device cannot be cleaned up", where=self.name, do=left)

    def push(self, local: Path, remote: str) -> None:
        """Copies a file there; raises MissingToolError unless it is there whole, with its size and sha256."""
        try:
            status = local.stat()
        except OSError as error:
            raise InputError("cannot read file", where=str(local), why=error.strerror or str(error)) from error
        size, digest = status.st_size, sha256_file(local)
        wanted = size + FREE_MARGIN_MB * 2**20
        self._refuse_full(posixpath.dirname(remote), wanted, wanted)
        said = self._transfer(lambda timeout: self._link.send(local, remote, timeout), size)
        there, there_digest = self._identity(remote, size, executable=bool(status.st_mode & 0o100))
        if there != size:
            if any(text in said for text in NO_SPACE):
                raise full(self.name, size)
            self._refuse_full(posixpath.dirname(remote), 2**20, size)
            raise self._interrupted(f"{max(there, 0)} of {size} bytes of {local.name} arrived", said)
        if there_digest not in ("", digest):
            raise self._interrupted(f"{local.name} has another sha256 there", said)

    def run(self, command: Sequence[str], *, folder: str, env: Mapping[str, str] = NOTHING, timeout: float) -> Finished:
        """Runs a program in `folder`, well or not; it is stopped after `timeout` seconds (MissingToolError)."""
        try:
            finished = self._ask(posix.program(command, folder, env), timeout)
        except subprocess.TimeoutExpired as error:
            self._well(posix.stop_all(folder), "program cannot be stopped")
            why = f"{posixpath.basename(command[0])} was stopped after {timeout:g} s"
            raise MissingToolError("program does not end", where=self.name, why=why) from error
        if finished.code:
            if any(text in finished.stderr for text in NO_SPACE):
                raise MissingToolError(
                    "device is full",
                    where=self.name,
                    why=complaint(finished.stderr, finished.code),
                    do="free space there",
                )
            self._refuse_full(folder, 2**20, 2**20)
        return finished

    def pull(self, remote: str, local: Path) -> None:
        """Copies a file here, whole or not at all. Raises VerdictError when there is none, MissingToolError else."""
        size, digest = self._identity(remote, RESULT_BYTES)
        if size < 0:
            raise VerdictError("a program left no such file", where=self.name, why=remote)
        with write_beside(local) as part:
            said = self._transfer(lambda timeout: self._link.fetch(remote, part, timeout), size)
            here = part.stat().st_size if part.exists() else 0
            if here != size:
                raise self._interrupted(f"{here} of {size} bytes of {posixpath.basename(remote)} arrived", said)
            if digest and sha256_file(part) != digest:
                raise self._interrupted(f"{posixpath.basename(remote)} has another sha256 here", said)

    def _ask(self, script: str, timeout: float) -> Finished:
        """Runs a script to its end. Raises the link's fault when it does not come to one, and TimeoutExpired."""
        mark = f"afq-{secrets.token_hex(8)}"
        output = self._link.shell(posix.wrapped(script, mark), timeout)
        before, finished = posix.unwrapped(output.stdout, mark)
        if finished is None:
            raise self._link.fault(output)
        if before:
            why = f"its shell says {before.decode(errors='replace').strip()[:80]!r} before every command"
            do = "keep its start-up files silent when no terminal is there"
            raise MissingToolError("device cannot be used", where=self.name, why=why, do=do)
        return finished

    def _well(self, script: str, what: str) -> Finished:
        """`_ask` of a small question, which must end well and soon."""
        try:
            finished = self._ask(script, ANSWER_S)
        except subprocess.TimeoutExpired as error:
            raise gone(self.name, f"no answer within {ANSWER_S:g} s") from error
        if finished.code:
            raise MissingToolError(what, where=self.name, why=complaint(finished.stderr, finished.code))
        return finished

    def _refuse_full(self, folder: str, needed: int, size: int) -> None:
        """Makes `folder`. Raises MissingToolError when less than `needed` bytes are free, which are for `size`."""
        free = posix.free_bytes(self._well(posix.make_room(folder), "device cannot be written").stdout.decode())
        if free is not None and free < needed:
            raise full(self.name, size, free)

    def _transfer(self, transfer: Callable[[float], str], size: int) -> str:
        timeout = ANSWER_S + size / SLOWEST_BYTES_S
        try:
            return transfer(timeout)
        except subprocess.TimeoutExpired:
            return f"not done within {timeout:.0f} s"

    def _identity(self, remote: str, size: int, executable: bool = False) -> tuple[int, str]:
        """Size and sha256 of a file there; size -1 where it is not."""
        try:
            finished = self._ask(posix.identity(remote, executable), ANSWER_S + size / SLOWEST_BYTES_S)
        except subprocess.TimeoutExpired as error:
            raise gone(self.name, "no answer") from error
        if finished.code == posix.NOEXEC:
            why = f"the file system of {posixpath.dirname(remote)} does not allow it"
            do = "name another folder there with AFQ_DEVICE_FOLDER"
            raise MissingToolError("device runs no programs", where=self.name, why=why, do=do)
        return (-1, "") if finished.code else posix.read_identity(finished.stdout)

    def _interrupted(self, why: str, said: str) -> MissingToolError:
        words = complaint(said, 0) if said.strip() else ""
        return MissingToolError(
            "transfer was interrupted", where=self.name, why=": ".join(filter(None, (why, words))), do="try again"
        )

    def _leave(self, path: str, keep: bool) -> str:
        """Stops what runs in a folder and removes it unless `keep`; what to do when that fails, or nothing."""
        script = posix.stop_all(path) if keep else posix.remove_folder(path)
        for pause in (0.0, RETURN_S):
            time.sleep(pause)
            with contextlib.suppress(AfqError):
                self._well(script, "device cannot be cleaned up")
                return ""
        return f"remove {path} there"
