"""The bundle's README.md: a model card with the YAML front matter that Hugging Face tools read."""

from __future__ import annotations

import json
from pathlib import Path

from afq_export.report import tables
from afq_export.spec.report import UNKNOWN, Origin, ValidationReport

LIBRARIES = {".pte": "executorch", ".onnx": "onnx"}
"""Suffix of the exported file -> the library's name on the Hugging Face hub."""


def model_card(report: ValidationReport, origin: Origin = UNKNOWN) -> str:
    """The page, ending in a newline, with licence and base model as the source states them."""
    figures = report.perplexity
    measured = figures.runtime or figures.integer
    sections = [
        _front_matter(report, origin),
        f"# {report.model.name}, {report.recipe}, for {report.target}",
        "Quantized and exported by afq-export. `report.md` has the proof, `manifest.json` the digest of every file.",
        "## Quality",
        tables.perplexity_table(report).markdown(),
        f"Measured on {tables.protocol_line(report)}.",
        "## What was checked",
        f"Verdict: **{report.verdict}**" + (f" (perplexity {measured.value:.3f})" if measured else ""),
        tables.checks_table(report).markdown(),
    ]
    if report.coverage.lowered:
        sections += ["## Integer kernels", tables.kernels_table(report).markdown()]
    if report.artifact:
        sections += [
            "## Use",
            f"`{report.artifact.name}` ({tables.size_mb(report.artifact.bytes)}) holds the program and its weights; "
            "generate through the real runtime with",
            '```sh\nafq-export generate . --prompt "Once upon a time"\n```',
        ]
    return "\n\n".join(sections) + "\n"


def _front_matter(report: ValidationReport, origin: Origin) -> str:
    """YAML between `---` lines; strings are JSON strings, which are YAML."""
    fields: list[tuple[str, str | list[str]]] = [
        ("library_name", LIBRARIES.get(Path(report.artifact.name).suffix if report.artifact else "", "afq-export")),
        ("pipeline_tag", "text-generation"),
        ("tags", ["afq-export", "affinequant", "quantized", report.target, report.recipe]),
    ]
    if origin.base_model:
        fields += [("base_model", origin.base_model), ("base_model_relation", "quantized")]
    if origin.licence:
        fields.append(("license", origin.licence))
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields]
    return "\n".join(["---", *lines, "---"])
