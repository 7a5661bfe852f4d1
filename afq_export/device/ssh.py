"""`ssh:USER@HOST[:PORT]`: a board, reached with the OpenSSH client of this machine, its configuration and its keys."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import weakref

from afq_export.device.process import Output, execute
from afq_export.device.remote import Setup, ShellDevice
from afq_export.device.streams import StreamLink
from afq_export.device.tools import last_line
from afq_export.device.transport import gone
from afq_export.errors import AfqError, InputError, MissingToolError

CONNECT_S = 10
"""To connect within; and a connection that is silent for half as long, three times, is lost."""
PERSIST_S = 30
"""The shared connection ends by itself after so long unused, should this process be killed."""

_TARGET = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][\w.+-]*)@)?"
    r"(?:(?P<host>[A-Za-z0-9_][\w.-]*)|\[(?P<address>[0-9A-Fa-f:.]+(?:%\w+)?)\])"
    r"(?::(?P<port>\d{1,5}))?"
)
_LOST = 255
"""Exit code of ssh for faults of its own."""
_FAULTS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the known one",
        "make sure that it is the right machine, then `ssh-keygen -R` its name",
    ),
    (
        r"Host key verification failed|host key is known for",
        "its host key is not known",
        "connect once by hand with ssh and compare the fingerprint",
    ),
    (
        r"Permission denied|Too many authentication failures|No supported authentication methods",
        "the login is refused",
        "set up a key for it (ssh-copy-id), or name one in ~/.ssh/config; no password is asked for",
    ),
    (r"Could not resolve hostname|Name or service not known", "there is no host of this name", ""),
    (
        r"Connection refused|Connection timed out|No route to host|Network is unreachable|timed out during banner",
        "it cannot be reached",
        "is it on, in this network, and its ssh server running?",
    ),
    (r"Bad configuration option|[Cc]an't open user config|no argument after", "ssh does not start", "look at AFQ_SSH"),
)
"""What ssh says -> why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where to log in; `user` empty and `port` 0 for what ssh's configuration has."""

    host: str
    user: str = ""
    port: int = 0


def parse_target(text: str) -> Target:
    """Target of `[USER@]HOST[:PORT]`, where HOST may be a name of ssh's configuration or an [IPv6 address].

    Raises InputError for another form.
    """
    found = _TARGET.fullmatch(text)
    port = int(found["port"] or 0) if found else 0
    if not found or port > 65535 or found["port"] == "0":
        raise InputError("not a target for ssh", where=f"ssh:{text}", do="give ssh:USER@HOST or ssh:USER@HOST:PORT")
    return Target(found["host"] or found["address"], found["user"] or "", port)


class SshLink(StreamLink):
    """One shared connection (ControlMaster) for all commands; it is made anew when it broke."""

    kind = "ssh"
    bases = ('"$TMPDIR"', "/var/tmp", "/tmp", '"$HOME"')
    """/var/tmp before /tmp, which is memory on many boards."""

    def __init__(self, given: str) -> None:
        self.name = f"ssh:{given}"
        target = parse_target(given)
        program = shlex.split(os.environ.get("AFQ_SSH", "")) or ["ssh"]
        if shutil.which(program[0]) is None:
            do = "install the Debian package openssh-client"
            raise MissingToolError("no ssh client", where=self.name, why=f"{program[0]} is not on this machine", do=do)
        folder = tempfile.mkdtemp(prefix="afq-ssh-")
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_S,
            "ServerAliveInterval": CONNECT_S // 2,
            "ServerAliveCountMax": 3,
            "ControlMaster": "auto",
            "ControlPath": os.path.join(folder, "m"),
            "ControlPersist": PERSIST_S,
            "EscapeChar": "none",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "RequestTTY": "no",
        }
        self._ssh = [*program, *(f"-o{name}={value}" for name, value in options.items())]
        self._ssh += ["-p", str(target.port)] if target.port else []
        self._ssh += ["-l", target.user] if target.user else []
        self._host = target.host
        self._close = weakref.finalize(self, _close, [*self._ssh, "-O", "exit", "--", target.host], folder)

    def fault(self, output: Output) -> AfqError:
        """What ssh says of the connection."""
        for pattern, why, do in _FAULTS:
            if output.code == _LOST and re.search(pattern, output.stderr):
                return gone(self.name, why, do)
        if output.code == _LOST:
            return gone(self.name, f"the connection was lost: {last_line(output.stderr, output.code)}")
        why = f"it runs no commands of a POSIX shell: {last_line(output.stderr, output.code)}"
        return gone(self.name, why, "the account needs a shell")

    def _command(self, script: str) -> list[str]:
        return [*self._ssh, "--", self._host, f"exec sh -c {shlex.quote(script)}"]


def open_ssh(given: str, setup: Setup | None = None) -> ShellDevice:
    """The machine of `[USER@]HOST[:PORT]`. $AFQ_SSH is the command to use, `ssh -F FILE` or `ssh -i KEY`.

    Raises InputError for another form, and MissingToolError where ssh is not installed. It connects when asked.
    """
    return ShellDevice(SshLink(given), setup or Setup())


def _close(command: list[str], folder: str) -> None:
    """Ends the shared connection, if there is one."""
    with contextlib.suppress(MissingToolError, subprocess.TimeoutExpired):
        execute(command, timeout=CONNECT_S)
    shutil.rmtree(folder, ignore_errors=True)
