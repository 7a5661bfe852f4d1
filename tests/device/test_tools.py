"""Programs of the machine: what they say when they fail reaches the user as one line."""

from __future__ import annotations

import sys

import pytest

from afq_export.device.tools import complaint, last_line, require, run
from afq_export.errors import MissingToolError


def test_the_line_that_says_most() -> None:
    assert complaint("Reading...\nE: no such suite\nmore\n", 100) == "E: no such suite"
    assert complaint("one\n\n two \n", 1) == "two"
    assert complaint("", 7) == "exit code 7"
    assert last_line("an error on the way\nqemu: uncaught target signal 4 (Illegal instruction)\n", -4) == (
        "qemu: uncaught target signal 4 (Illegal instruction)"
    )


def test_a_program_that_fails() -> None:
    code = "import sys; print('ERROR: no matching distribution', file=sys.stderr); sys.exit(3)"
    with pytest.raises(MissingToolError, match=r"cannot download \[.*\]: ERROR: no matching distribution"):
        run([sys.executable, "-c", code], "cannot download")
    assert run([sys.executable, "-c", code], "cannot download", good=(0, 3)) == ""


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(MissingToolError, match="no-such-program is not on this machine: it does things"):
        require("no-such-program", "does things")
    with pytest.raises(MissingToolError, match="cannot do it"):
        run(["no-such-program"], "cannot do it")
