"""The report stage: report.json, report.md and the model card beside the exported file."""

from __future__ import annotations

from pathlib import Path

from afq_export.files import write_text
from afq_export.report.card import model_card
from afq_export.report.markdown import report_markdown
from afq_export.spec.report import Origin, ValidationReport, to_json


def write_reports(folder: Path, report: ValidationReport, origin: Origin) -> None:
    """Writes the three files to the bundle; the caller seals it again."""
    write_text(folder / "report.json", to_json(report))
    write_text(folder / "report.md", report_markdown(report))
    write_text(folder / "README.md", model_card(report, origin))
