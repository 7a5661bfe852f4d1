"""Errors that a user can act on.

Every failure that is not a bug is an `AfqError`: it says what went wrong, where (file, block, layer, key, target), why,
and what to do, on one line, and carries the exit code of the process. The command line prints `str(error)`; the
traceback is shown only with `--debug`.
"""

from __future__ import annotations


class AfqError(Exception):
    """Base of all errors meant for users. `str()` is one line: `what [where]: why; what to do`."""

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = what, where, why, do
        line = what + (f" [{where}]" if where else "") + (f": {why}" if why else "") + (f"; {do}" if do else "")
        super().__init__(" ".join(line.split()))


class InputError(AfqError):
    """Wrong input: a path, a model, a recipe, a target, a corpus, a flag. Exit code 2."""

    exit_code = 2


class VerdictError(AfqError):
    """A check came out wrong: the artifact is not what was promised. Exit code 1."""

    exit_code = 1


class MissingToolError(AfqError):
    """A tool, a runtime or a package is not on this machine. Exit code 3."""

    exit_code = 3
