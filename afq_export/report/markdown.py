"""report.md: everything that report.json says, for a reader."""

from __future__ import annotations

from afq_export.report import tables
from afq_export.spec.report import DeviceReport, Disagreement, ValidationReport

MAX_DISAGREEMENTS = 20
"""Rows of the disagreement table; report.json has all."""


def report_markdown(report: ValidationReport) -> str:
    """The page, ending in a newline."""
    departure = f", first departure: `{report.first_departure}`" if report.first_departure else ""
    sections = [
        f"# {report.model.name}: {report.recipe} on {report.target}",
        f"Verdict: **{report.verdict}**{departure}",
        _facts(report),
        "## Perplexity",
        tables.perplexity_table(report).markdown(),
        f"Protocol: {tables.protocol_line(report)}. The standard error is taken over windows.",
        "## Checks",
        tables.checks_table(report).markdown(),
        *_disagreements(report.agreement.disagreements),
        *_devices(report),
        *_calibration(report),
        *_coverage(report),
        *_layers(report),
    ]
    return "\n\n".join(sections) + "\n"


def _facts(report: ValidationReport) -> str:
    """Source, file and cost as a list."""
    cost = report.cost
    facts = [f"- source weights: sha256 `{report.model.digest}`"]
    if report.artifact:
        size = tables.size_mb(report.artifact.bytes)
        facts.append(f"- `{report.artifact.name}`: {size}, sha256 `{report.artifact.sha256}`")
    if report.agreement.top1 is not None:
        kl = tables.number(report.agreement.kl, ".2e")
        facts.append(f"- exported file against the integer reference: top-1 {report.agreement.top1:.3%}, KL {kl}")
        facts.append(f"- float operators between the reference's integer linears: {_between(report)}")
    costs = {"calibration, s": cost.calibrate_s, "export, s": cost.export_s, "peak memory, MB": cost.peak_rss_mb}
    facts += [f"- {what}: {value:.0f}" for what, value in costs.items() if value is not None]
    return "\n".join(facts)


def _between(report: ValidationReport) -> str:
    """Whose they are, and what that makes of the comparison."""
    if report.agreement.float_operators == "torch":
        return "torch's, so float32 noise can flip a code"
    equal = tables.number(report.agreement.bit_for_bit, ".3%")
    return f"{report.agreement.float_operators}'s own, run alone; logits equal bit for bit at {equal} of the tokens"


def _disagreements(items: tuple[Disagreement, ...]) -> list[str]:
    if not items:
        return []
    rows = tuple(
        (str(d.window), str(d.position), str(d.reference), str(d.runtime), f"{d.margin:.1e}", _reason(d))
        for d in items[:MAX_DISAGREEMENTS]
    )
    header = ("window", "position", "reference", "exported", "margin", "why")
    left = f"{len(items) - len(rows)} more in report.json." if len(items) > len(rows) else ""
    table = tables.Table(header, rows, frozenset(range(5))).markdown()
    return ["## Where the exported file chooses another token", table, *([left] if left else [])]


def _reason(item: Disagreement) -> str:
    return item.reason.replace("_", " ") + (f" at {item.layer}" if item.layer else "")


def _devices(report: ValidationReport) -> list[str]:
    if not report.devices:
        return []
    first = report.devices[0]
    how = f" under {first.emulator}, which says nothing of speed" if first.emulator else ""
    meaning = (
        f"The same file in {first.runtime}{how}, against this machine, on {first.windows} windows of {first.window} "
        "tokens. Instructions: how many distinct ones ran in the runtime's libraries."
    )
    notes = [f"- {device.device}: {note}" for device in report.devices for note in _ran(device) if note]
    return ["## Devices", meaning, tables.devices_table(report).markdown(), *(["\n".join(notes)] if notes else [])]


def _ran(device: DeviceReport) -> tuple[str, str]:
    """The matrix products that the runtime says it executed, and the note."""
    products = {name: count for name, count in device.operators.items() if "MatMul" in name or "Gemm" in name}
    executed = ", ".join(f"{count} {name}" for name, count in products.items())
    return (f"executed {executed}" if executed else "", device.note)


def _calibration(report: ValidationReport) -> list[str]:
    if not report.calibration:
        return []
    meaning = "Squared error of each block's output over its mean square; every epoch is in report.json."
    return ["## Calibration", meaning, tables.calibration_table(report).markdown()]


def _coverage(report: ValidationReport) -> list[str]:
    if not report.coverage.lowered:
        return []
    parts = ["## Coverage", tables.kernels_table(report).markdown()]
    return parts + ([tables.refused_table(report).markdown()] if report.coverage.refused else [])


def _layers(report: ValidationReport) -> list[str]:
    return ["## Layers", tables.layers_table(report).markdown()] if report.layers else []
