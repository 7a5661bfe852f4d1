"""What a report says, section by section, once for every form that it takes: Markdown and HTML."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from afq_export.report import tables
from afq_export.report.npu import npu_sentence, npu_table, npu_title
from afq_export.report.tables import Table
from afq_export.spec.report import DeviceReport, Disagreement, Manifest, ValidationReport

MAX_DISAGREEMENTS = 20
"""Rows of the disagreement table; report.json has all."""


@dataclasses.dataclass(frozen=True)
class Section:
    """`text` stands before the table, `after` behind it, `notes` are a list below. `plots` draws SVGs when asked.

    A `long` section is folded where the page can fold.
    """

    title: str
    table: Table | None = None
    text: str = ""
    after: str = ""
    notes: Sequence[str] = ()
    plots: Callable[[], Sequence[str]] = tuple
    long: bool = False


def sections(report: ValidationReport) -> list[Section]:
    """Everything below verdict and facts; what the report does not have is left out."""
    estimates = report.coverage.estimates
    parts = [
        Section(
            "Perplexity",
            tables.perplexity_table(report),
            after=f"Protocol: {tables.protocol_line(report)}. The standard error is taken over windows.",
            plots=lambda: [_plots().rungs_plot({report.recipe: report})],
        ),
        Section("Checks", tables.checks_table(report)),
        _disagreements(report.agreement.disagreements),
        _devices(report),
        _calibration(report),
        _coverage(report),
        *(Section(npu_title(e), npu_table(e), npu_sentence(e), long=True) for e in estimates),
        Section("Size", tables.size_table(report.size)) if report.size else None,
        _folds(report),
        _layers(report),
    ]
    return [part for part in parts if part]


def provenance(manifest: Manifest) -> Section:
    """What a bundle was made from, by which command and which versions."""
    facts = {"model": manifest.model.name, "weights sha256": manifest.model.digest, "recipe": manifest.recipe}
    facts |= {"target": manifest.target, "seed": str(manifest.seed), "command": " ".join(manifest.command)}
    rows = [*facts.items(), *((f"{name} version", number) for name, number in manifest.versions.items())]
    rows += [(name, f"sha256 {digest}") for name, digest in manifest.files.items()]
    return Section("Provenance", Table(("fact", "value"), tuple(rows)), long=True)


def facts(report: ValidationReport) -> list[str]:
    """Source, file and cost, a line each."""
    cost = report.cost
    lines = [f"source weights: sha256 `{report.model.digest}`"]
    if report.artifact:
        size = tables.size_mb(report.artifact.bytes)
        lines.append(f"`{report.artifact.name}`: {size}, sha256 `{report.artifact.sha256}`")
    if report.kv_cache:
        lines.append(f"KV cache: {tables.cache_line(report.kv_cache)}")
    if report.agreement.top1 is not None:
        kl = tables.number(report.agreement.kl, ".2e")
        lines.append(f"exported file against the integer reference: top-1 {report.agreement.top1:.3%}, KL {kl}")
        lines.append(f"float operators between the reference's integer linears: {_between(report)}")
    costs = {"calibration, s": cost.calibrate_s, "export, s": cost.export_s, "peak memory, MB": cost.peak_rss_mb}
    return lines + [f"{what}: {value:.0f}" for what, value in costs.items() if value is not None]


def _plots():
    """The drawings, and matplotlib with them, only where they are wanted."""
    from afq_export.report import plots

    return plots


def _between(report: ValidationReport) -> str:
    """Whose they are, and what that makes of the comparison."""
    if report.agreement.float_operators == "torch":
        return "torch's, so float32 noise can flip a code"
    equal = tables.number(report.agreement.bit_for_bit, ".3%")
    return f"{report.agreement.float_operators}'s own, run alone; logits equal bit for bit at {equal} of the tokens"


def _disagreements(items: tuple[Disagreement, ...]) -> Section | None:
    if not items:
        return None
    rows = tuple(
        (str(d.window), str(d.position), str(d.reference), str(d.runtime), f"{d.margin:.1e}", _reason(d))
        for d in items[:MAX_DISAGREEMENTS]
    )
    header = ("window", "position", "reference", "exported", "margin", "why")
    left = f"{len(items) - len(rows)} more in report.json." if len(items) > len(rows) else ""
    table = Table(header, rows, frozenset(range(5)))
    return Section("Where the exported file chooses another token", table, after=left, long=True)


def _reason(item: Disagreement) -> str:
    return item.reason.replace("_", " ") + (f" at {item.layer}" if item.layer else "")


def _devices(report: ValidationReport) -> Section | None:
    if not report.devices:
        return None
    first = report.devices[0]
    how = f" under {first.emulator}, which says nothing of speed" if first.emulator else ""
    meaning = (
        f"The same file in {first.runtime}{how}, against this machine, on {first.windows} windows of {first.window} "
        "tokens. Instructions: how many distinct ones ran in the runtime's libraries."
    )
    notes = [f"{device.device}: {note}" for device in report.devices for note in _ran(device) if note]
    return Section("Devices", tables.devices_table(report), text=meaning, notes=notes)


def _ran(device: DeviceReport) -> tuple[str, str]:
    """The matrix products that the runtime says it executed, and the note."""
    products = {name: count for name, count in device.operators.items() if "MatMul" in name or "Gemm" in name}
    executed = ", ".join(f"{count} {name}" for name, count in products.items())
    return (f"executed {executed}" if executed else "", device.note)


def _calibration(report: ValidationReport) -> Section | None:
    history = report.calibration
    if not history:
        return None
    meaning = "Squared error of each block's output over its mean square; every epoch is in report.json."

    def drawn() -> list[str]:
        plots = _plots()
        found = (plots.losses_plot(history), plots.epochs_plot(history), plots.health_plot(history))
        return [drawing for drawing in found if drawing]

    table, notes = tables.calibration_table(report), tables.tuning_lines(report.tuning)
    return Section("Calibration", table, text=meaning, notes=notes, plots=drawn, long=len(history) > 12)


def _coverage(report: ValidationReport) -> Section | None:
    if not report.coverage.lowered:
        return None
    refused = [f"outside: {r.count} {r.what}: {r.reason}" for r in report.coverage.refused]
    return Section("Coverage", tables.kernels_table(report), notes=refused)


def _folds(report: ValidationReport) -> Section | None:
    if not report.sites:
        return None
    notes = tables.site_reasons(report.sites) + tables.online_lines(report.online)
    return Section("Folds", tables.sites_table(report.sites), notes=notes)


def _layers(report: ValidationReport) -> Section | None:
    layers = report.layers
    if not layers:
        return None

    def drawn() -> list[str]:
        plots = _plots()
        sqnr = {layer.name: layer.sqnr_db for layer in layers}
        steps = {layer.name: layer.max_steps for layer in layers}
        found = (
            plots.layers_plot(layers, sqnr, "SQNR, dB", ".0f"),
            plots.layers_plot(layers, steps, "steps off the integer model", ".2g"),
        )
        return [drawing for drawing in found if drawing]

    return Section("Layers", tables.layers_table(report), plots=drawn, long=True)
