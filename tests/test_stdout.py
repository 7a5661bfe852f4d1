"""What a library prints from C stays off standard output; what is printed before and after arrives, in order."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from afq_export.stdout import standard_output_closed

SAY = "import os, sys; from afq_export.stdout import standard_output_closed as closed\n"


def test_only_inside(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    with pytest.raises(KeyError), standard_output_closed():
        libc.puts(b"of a library")
        os.write(1, b"of another\n")
        raise KeyError
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def test_where_there_is_none() -> None:
    """`afq-export run >&-`: that is not an error."""
    code = SAY + "os.close(1)\nwith closed(): sys.stderr.write('inside')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "inside"
