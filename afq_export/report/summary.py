"""The lines that `run` prints at its end: plain text, aligned columns."""

from __future__ import annotations

from pathlib import Path

from afq_export.report import tables
from afq_export.spec.report import ValidationReport


def _rolled_back(report: ValidationReport) -> list[str]:
    """The blocks whose learning diverged; report.md says how each ended."""
    diverged = enumerate(any("rolled back" in event for event in block.events) for block in report.calibration)
    return [f"block {index}" for index, found in diverged if found]


def summary(report: ValidationReport, bundle: Path | None = None) -> str:
    """Verdict, perplexities, checks, and where the bundle is; no trailing newline."""
    lines = [
        f"{report.verdict.upper()}  {report.model.name}  {report.recipe}  {report.target}",
        "",
        tables.perplexity_table(report).text(),
        "",
        tables.checks_table(report).text(),
        "",
    ]
    if report.coverage.lowered:
        lines += [tables.kernels_table(report).text(), ""]
    facts = {
        "text": tables.protocol_line(report),
        "file": tables.size_mb(report.artifact.bytes) if report.artifact else None,
        "KV cache": tables.cache_line(report.kv_cache) if report.kv_cache else None,
        "bundle": str(bundle) if bundle else None,
        "first departure": report.first_departure,
        "rolled back": ", ".join(_rolled_back(report)) or None,
    }
    given = {name: value for name, value in facts.items() if value}
    width = max(map(len, given))
    return "\n".join([*lines, *(f"{name.ljust(width)}  {value}" for name, value in given.items())])
