"""GitHub Actions: annotations, which are lines of a fixed form that the runner reads, and the page of a step.

Source: GitHub's documentation, "Workflow commands for GitHub Actions".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from afq_export.errors import AfqError
from afq_export.guard.text import differences_line, headline
from afq_export.spec.guard import CheckReport

TITLE = "afq-export check"
LEVELS = {"failed": "error", "inconclusive": "error", "skipped": "notice"}
SUMMARY = "GITHUB_STEP_SUMMARY"
MAX_SUMMARY = 1 << 20
"""GitHub refuses a page of more than 1 MiB."""


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether this process runs in a workflow."""
    return environment.get("GITHUB_ACTIONS") == "true"


def workflow_commands(report: CheckReport) -> str:
    """A line for every gate that did not pass, and one for what differs when the verdict is no pass."""
    lines = [
        _command(LEVELS[gate.status], f"{TITLE}: {gate.name} {gate.status}", gate.detail)
        for gate in report.gates
        if gate.status in LEVELS
    ]
    changed = differences_line(report.differences)
    if changed and report.verdict != "pass":
        lines.append(_command("warning", f"{TITLE}: not as in the baseline", changed))
    lines.append(_command("notice", TITLE, headline(report)))
    return "\n".join(lines)


def error_annotation(error: AfqError) -> str:
    """The line for a check that could not be made."""
    return _command("error", TITLE, str(error))


def append_summary(page: str, environment: Mapping[str, str]) -> str:
    """Adds `page` to the step's, where the runner names a file for it.

    Returns the annotation that says why it is not there, which changes no verdict; empty when it is, or none is wanted.
    """
    name = environment.get(SUMMARY)
    if not name:
        return ""
    try:
        path = Path(name)
        whole = len(page.encode()) + 1 + (path.stat().st_size if path.exists() else 0)
        if whole > MAX_SUMMARY:
            return _left_out(f"it would have {whole} bytes, GitHub shows at most {MAX_SUMMARY}")
        with path.open("a", encoding="utf-8") as file:
            file.write(page + "\n")
    except OSError as error:
        return _left_out(f"cannot write {name}: {error.strerror or error}")
    return ""


def _left_out(why: str) -> str:
    return _command("warning", f"{TITLE}: no step summary", why)


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={_escaped(title, ':,')}::{_escaped(message)}"


def _escaped(text: str, more: str = "") -> str:
    """Per cent signs first, then what would end a command, or (`more`) one of its properties."""
    for letter in "%\r\n" + more:
        text = text.replace(letter, f"%{ord(letter):02X}")
    return text
