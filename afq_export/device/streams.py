"""Files through a shell's standard input and output: `cat` is on every device, an sftp server is not."""

from __future__ import annotations

import shlex
from pathlib import Path

from afq_export.device.process import Output, execute


class StreamLink:
    """A `Link` (afq_export/device/remote.py) whose commands take a script as last word and pass both streams on."""

    def _command(self, script: str) -> list[str]:
        raise NotImplementedError

    def shell(self, script: str, timeout: float, stdin: Path | None = None, stdout: Path | None = None) -> Output:
        """Runs a script there."""
        return execute(self._command(script), timeout=timeout, stdin=stdin, stdout=stdout)

    def send(self, local: Path, remote: str, timeout: float) -> str:
        """Copies a file there."""
        return self.shell(f"LC_ALL=C; export LC_ALL; cat >{shlex.quote(remote)}", timeout, stdin=local).stderr

    def fetch(self, remote: str, local: Path, timeout: float) -> str:
        """Copies a file here."""
        return self.shell(f"exec cat {shlex.quote(remote)}", timeout, stdout=local).stderr
