"""Two bundles side by side: figures, what they were made of, and where their linears differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from afq_export.errors import InputError
from afq_export.lower.bundle import open_bundle
from afq_export.report import tables
from afq_export.report.sections import Section
from afq_export.report.tables import MISSING, Table, figure, number
from afq_export.spec.report import Manifest, Perplexity, ValidationReport
from afq_export.spec.strict import flat, read_toml

PAIRED = "Reports keep no losses by token: `afq-export check` gives the difference of two files with its paired error."


@dataclasses.dataclass(frozen=True)
class Subject:
    """A validated bundle: its report and manifest; `made` is recipe, target and versions, flat."""

    name: str
    report: ValidationReport
    manifest: Manifest
    made: Mapping[str, str]


def open_subject(folder: Path) -> Subject:
    """The bundle in `folder`. Raises InputError when it was changed or never validated."""
    bundle = open_bundle(folder)
    report = bundle.report()
    if report is None:
        raise InputError(
            "the bundle has no report", where=str(folder), do=f"run `afq-export validate {quote(str(folder))}`"
        )
    made = {}
    for kind in ("recipe", "target"):  # as they stand: an older version may have had other keys
        made |= flat(kind, _named(read_toml(folder / f"{kind}.toml")))
    made |= {"weights": report.model.digest, "seed": str(bundle.manifest.seed)}
    made |= {f"version.{name}": number for name, number in bundle.manifest.versions.items()}
    return Subject(f"{report.model.name} {report.recipe} {report.target}", report, bundle.manifest, made)


def comparison(a: Subject, b: Subject) -> list[Section]:
    """Sections for two bundles; perplexities are set against each other only when their protocols are the same."""
    same = a.report.protocol == b.report.protocol
    note = PAIRED if same else "Their perplexities were measured on other texts or windows, and are not compared."
    return [
        Section("Side by side", _figures(a.report, b.report, same), after=note),
        Section("Perplexity", _perplexities(a.report, b.report, same), plots=lambda: _rungs(a, b) if same else []),
        _differences(a, b),
        _layers(a.report, b.report),
        *(Section(f"Protocol of {name}", text=tables.protocol_line(s.report)) for name, s in (("A", a), ("B", b))),
    ]


def _figures(a: ValidationReport, b: ValidationReport, same: bool) -> Table:
    """What a reader decides by."""
    rows = [("verdict", a.verdict, b.verdict, "")]
    measured = [report.perplexity.runtime for report in (a, b)]
    rows.append(("perplexity of the file", *map(figure, measured), _change(*measured) if same else MISSING))
    over = [_over_float(report) for report in (a, b)]
    rows.append(("over float", *(number(value, "+.2%") for value in over), ""))
    if a.artifact and b.artifact:
        sizes = (a.artifact.bytes, b.artifact.bytes)
        rows.append(("file", *map(tables.size_mb, sizes), f"{sizes[1] / sizes[0] - 1:+.1%}"))
    near = [report.agreement.against_float.get("runtime") for report in (a, b)]
    rows.append(("top-1 as float", *(number(n and n.top1, ".2%") for n in near), ""))
    rows.append(("KL(float)", *(number(n and n.kl, ".2e") for n in near), ""))
    rows.append(("top-1 as the integer reference", *(number(r.agreement.top1, ".3%") for r in (a, b)), ""))
    rows.append(("logits equal bit for bit", *(number(r.agreement.bit_for_bit, ".3%") for r in (a, b)), ""))
    rows.append(("calibration, s", *(number(r.cost.calibrate_s, ".0f") for r in (a, b)), ""))
    return Table(("figure", "A", "B", "B over A"), tuple(rows), frozenset({1, 2, 3}))


def _perplexities(a: ValidationReport, b: ValidationReport, same: bool) -> Table:
    rows = tuple(
        (tables.RUNG_TITLES[rung], figure(one), figure(other), _change(one, other) if same else MISSING)
        for (rung, one), (_, other) in zip(a.perplexity.items(), b.perplexity.items(), strict=True)
    )
    return Table(("rung", "A", "B", "B over A"), rows, frozenset({1, 2, 3}))


def _rungs(a: Subject, b: Subject) -> list[str]:
    from afq_export.report.plots import rungs_plot

    return [rungs_plot({"A": a.report, "B": b.report})]


def _differences(a: Subject, b: Subject) -> Section:
    """Everything the two were made with that is not the same."""
    keys = [key for key in dict.fromkeys([*a.made, *b.made]) if a.made.get(key) != b.made.get(key)]
    rows = tuple((key, a.made.get(key, MISSING), b.made.get(key, MISSING)) for key in keys)
    text = "" if rows else "Nothing: same weights, recipe, target, seed and versions."
    return Section("What differs", Table(("setting", "A", "B"), rows) if rows else None, text=text, long=len(rows) > 12)


def _layers(a: ValidationReport, b: ValidationReport) -> Section:
    """Each linear of both, by name."""
    ours, theirs = ({layer.name: layer for layer in report.layers} for report in (a, b))
    shared = [name for name in ours if name in theirs]
    gains = {name: _minus(theirs[name].sqnr_db, ours[name].sqnr_db) for name in shared}
    rows = tuple(
        (
            name,
            ours[name].kernel,
            theirs[name].kernel,
            number(ours[name].sqnr_db, ".1f"),
            number(theirs[name].sqnr_db, ".1f"),
            number(gains[name], "+.1f"),
        )
        for name in shared
    )
    header = ("linear", "kernel A", "kernel B", "SQNR A, dB", "SQNR B, dB", "B - A")

    def drawn() -> list[str]:
        from afq_export.report.plots import layers_plot

        drawing = layers_plot(b.layers, gains, "SQNR of B over A, dB", "+.1f")
        return [drawing] if drawing else []

    text = "" if rows else "They have no linear in common."
    return Section("Layers", Table(header, rows, frozenset({3, 4, 5})), text=text, plots=drawn, long=True)


def _change(one: Perplexity | None, other: Perplexity | None) -> str:
    return f"{other.value / one.value - 1:+.2%}" if one and other else MISSING


def _over_float(report: ValidationReport) -> float | None:
    base, measured = report.perplexity.float_, report.perplexity.runtime
    return measured.value / base.value - 1 if base and measured else None


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _named(value: Any) -> Any:
    """Nested data whose lists of tables are tables, by their items' names or numbers."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(item.get("name", index)): item for index, item in enumerate(value)}
    return {key: _named(item) for key, item in value.items()} if isinstance(value, dict) else value
