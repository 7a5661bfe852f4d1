"""report.md: everything that report.json says, for a reader."""

from __future__ import annotations

from collections.abc import Sequence

from afq_export.report.sections import Section, facts, sections
from afq_export.spec.report import ValidationReport


def report_markdown(report: ValidationReport, more: Sequence[Section] = ()) -> str:
    """The page, ending in a newline; `more` sections stand at its end."""
    departure = f", first departure: `{report.first_departure}`" if report.first_departure else ""
    lines = [
        f"# {report.model.name}: {report.recipe} on {report.target}",
        f"Verdict: **{report.verdict}**{departure}",
        "\n".join(f"- {fact}" for fact in facts(report)),
    ]
    return "\n\n".join([*lines, *(sections_markdown([*sections(report), *more]))]) + "\n"


def sections_markdown(parts: Sequence[Section]) -> list[str]:
    """The sections' paragraphs and tables, without their plots."""
    lines = []
    for part in parts:
        table = part.table.markdown() if part.table else ""
        notes = "\n".join(f"- {note}" for note in part.notes)
        lines += [f"## {part.title}", *(text for text in (part.text, table, part.after, notes) if text)]
    return lines
