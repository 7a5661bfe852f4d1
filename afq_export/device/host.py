"""`host`: this machine, as a device like the others."""

from __future__ import annotations

import shlex
import sys
import tempfile
from dataclasses import replace

from afq_export.device.process import Output
from afq_export.device.remote import Setup, ShellDevice
from afq_export.device.streams import StreamLink
from afq_export.device.transport import gone
from afq_export.errors import AfqError


class HostLink(StreamLink):
    """Commands go to this machine's shell, scratch folders to its folder for temporary files."""

    name = kind = "host"

    @property
    def bases(self) -> tuple[str, ...]:
        """The folder for temporary files."""
        return (shlex.quote(tempfile.gettempdir()),)

    def fault(self, output: Output) -> AfqError:
        """The shell itself was killed."""
        return gone(self.name, f"its shell ended with {output.code}")

    def _command(self, script: str) -> list[str]:
        return ["/bin/sh", "-c", script]


def open_host(setup: Setup | None = None) -> ShellDevice:
    """This machine, with the Python that this process is."""
    given = setup or Setup()
    return ShellDevice(HostLink(), replace(given, python=given.python or sys.executable))
