"""The report as one HTML file that needs nothing else: no network, no script; plots are SVG, themes are CSS."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jinja2

from afq_export import __version__
from afq_export.report import tables
from afq_export.report.compare import Subject, comparison
from afq_export.report.markdown import report_markdown, sections_markdown
from afq_export.report.sections import Section, facts, provenance, sections
from afq_export.spec.report import ValidationReport

STATES = ("passed", "failed", "skipped", "fail")
"""Cells that the page colours."""


@dataclasses.dataclass(frozen=True)
class Head:
    """What stands on top: the verdict, and the figures that one looks for first."""

    label: str
    verdict: str
    departure: str | None
    figures: Sequence[tuple[str, str]]
    failed: Sequence[str]


def html(subjects: Sequence[Subject]) -> str:
    """The page of one bundle, or of two side by side."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("afq_export", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    labels = [""] if len(subjects) == 1 else [f"{letter}: {s.name}" for letter, s in zip("AB", subjects, strict=True)]
    return environment.get_template("page.html.jinja").render(
        title=_title(subjects),
        heads=[_head(label, subject.report) for label, subject in zip(labels, subjects, strict=True)],
        sections=_sections(subjects),
        states=STATES,
        version=__version__,
    )


def markdown(subjects: Sequence[Subject]) -> str:
    """The same without its plots."""
    if len(subjects) == 1:
        return report_markdown(subjects[0].report, [provenance(subjects[0].manifest)])
    lines = [f"# {_title(subjects)}", *sections_markdown(_sections(subjects))]
    return "\n\n".join(lines) + "\n"


def _title(subjects: Sequence[Subject]) -> str:
    if len(subjects) == 1:
        report = subjects[0].report
        return f"{report.model.name}: {report.recipe} on {report.target}"
    return f"A: {subjects[0].name}, B: {subjects[1].name}"


def _sections(subjects: Sequence[Subject]) -> list[Section]:
    if len(subjects) == 2:
        return comparison(*subjects)
    (subject,) = subjects
    source = Section("Source and cost", notes=[fact.replace("`", "") for fact in facts(subject.report)])
    return [*sections(subject.report), source, provenance(subject.manifest)]


def _head(label: str, report: ValidationReport) -> Head:
    base, measured = report.perplexity.float_, report.perplexity.runtime
    figures = [("exported file, perplexity", tables.figure(measured) if measured else "not run")]
    if base and measured:
        figures.append(("over float", f"{measured.value / base.value - 1:+.2%}"))
    if report.artifact:
        figures.append(("file", tables.size_mb(report.artifact.bytes)))
    if report.agreement.top1 is not None:
        figures.append(("same token as the integers", f"{report.agreement.top1:.2%}"))
    if report.agreement.bit_for_bit is not None:
        figures.append(("equal bit for bit", f"{report.agreement.bit_for_bit:.2%}"))
    failed = [f"{check.name}: {check.detail}" for check in report.checks if check.status == "failed"]
    return Head(label, report.verdict, report.first_departure, figures, failed)
