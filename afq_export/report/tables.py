"""The tables of a report, built once and rendered as Markdown or as plain text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from afq_export.spec.cache import Cache
from afq_export.spec.device import DeviceCheck
from afq_export.spec.history import Tuning
from afq_export.spec.online import OnlineCost
from afq_export.spec.report import LayerReport, Perplexity, Site, Size, ValidationReport

MISSING = "-"
FLOAT_BITS = 32
RUNG_TITLES = {
    "float": "float",
    "folded": "folded",
    "fake_quant": "fake-quant",
    "integer": "integer reference",
    "runtime": "exported file",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """`rows` of cells under `header`; columns in `right` are numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()

    def markdown(self) -> str:
        """A GitHub table."""
        rule = tuple("---:" if column in self.right else "---" for column in range(len(self.header)))
        return "\n".join(f"| {' | '.join(map(_escape, row))} |" for row in (self.header, rule, *self.rows))

    def text(self) -> str:
        """Aligned columns, two spaces between them, no trailing blanks."""
        lines = (self.header, *self.rows)
        widths = [max(len(row[column]) for row in lines) for column in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column in self.right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in lines
        )


def perplexity_table(report: ValidationReport) -> Table:
    """One row per rung: perplexity, its error, distance from float, agreement with float."""
    base = report.perplexity.float_
    rows = []
    for rung, figure in report.perplexity.items():
        near = report.agreement.against_float.get(rung)
        rows.append(
            (
                RUNG_TITLES[rung],
                f"{figure.value:.3f}" if figure else "skipped",
                f"{figure.stderr:.3f}" if figure else MISSING,
                f"{figure.value / base.value - 1:+.2%}" if figure and base and rung != "float" else MISSING,
                f"{near.top1:.2%}" if near else MISSING,
                f"{near.kl:.2e}" if near else MISSING,
            )
        )
    header = ("rung", "perplexity", "stderr", "over float", "top-1 as float", "KL(float)")
    return Table(header, tuple(rows), frozenset(range(1, 6)))


def checks_table(report: ValidationReport) -> Table:
    """One row per check."""
    return Table(("check", "status", "detail"), tuple((c.name, c.status, c.detail) for c in report.checks))


def layers_table(report: ValidationReport) -> Table:
    """One row per linear."""
    rows = tuple(
        (
            layer.name,
            layer.kernel,
            _exactness(layer),
            number(layer.max_steps, ".2g"),
            number(layer.sqnr_db, ".1f"),
            layer.note,
        )
        for layer in report.layers
    )
    return Table(("linear", "kernel", "runtime = model", "max steps", "SQNR dB", "note"), rows, frozenset({3, 4}))


def calibration_table(report: ValidationReport) -> Table:
    """One row per block: loss of rounding alone, of the start values, of what was kept; the last epoch's health."""
    rows = []
    for index, history in enumerate(report.calibration):
        last = history.epochs[-1] if history.epochs else None
        losses = (history.rounded_loss, history.start_loss, history.final_loss)
        health = (number(last and last.dominance, ".3f"), number(last and last.condition, ".1f"))
        rows.append((str(index), *(f"{loss:.2e}" for loss in losses), *health, "; ".join(history.events)))
    header = ("block", "rounded", "start", "kept", "dominance", "condition", "events")
    return Table(header, tuple(rows), frozenset(range(6)))


def tuning_lines(tuning: Tuning | None) -> list[str]:
    """What came after the blocks, in one line; none when nothing did."""
    if tuning is None:
        return []
    after = "not a finite number" if tuning.after is None else f"{tuning.after:.3e}"
    end = "" if tuning.kept else ": no better, so everything was left as it was"
    return [
        f"end to end: {tuning.steps} steps on {tuning.windows} windows; KL(float || quantized) of windows held out "
        f"{tuning.before:.3e} before, {after} after{end}"
    ]


def kernels_table(report: ValidationReport) -> Table:
    """Kernels and how many linears each runs."""
    kernels = [lowered.kernel for lowered in report.coverage.lowered]
    rows = tuple((kernel, str(kernels.count(kernel))) for kernel in dict.fromkeys(kernels))
    return Table(("kernel", "linears"), rows, frozenset({1}))


def devices_table(report: ValidationReport | DeviceCheck) -> Table:
    """One row per device: kernels that ran, and how near the file is to itself on this machine."""
    rows = tuple(
        (
            device.device,
            device.family,
            ", ".join(f"{name} {count}" for name, count in device.instructions.items()),
            f"{device.exact_linears} of {device.linears}",
            f"{device.there.value:.3f}",
            f"{device.there.value / device.here.value - 1:+.3%}",
            f"{device.top1:.2%}",
            f"{device.bit_for_bit:.2%}",
            f"{device.max_relative_error:.1e}",
        )
        for device in report.devices
    )
    header = (
        "device",
        "kernels",
        "instructions",
        "exact linears",
        "perplexity",
        "over here",
        "top-1",
        "bit for bit",
        "largest difference",
    )
    return Table(header, rows, frozenset(range(3, 9)))


def size_table(size: Size) -> Table:
    """What the exported file's bytes hold."""
    parts = {"block linears": size.linears, "head": size.head, "token rows": size.embedding, "all else": size.rest}
    rows = tuple((what, size_mb(value), f"{value / size.total:.1%}") for what, value in parts.items())
    return Table(("part of the file", "size", "share"), rows, frozenset({1, 2}))


def sites_table(sites: Sequence[Site]) -> Table:
    """One row per fold site: between which linears, what is folded."""
    rows = tuple(
        (
            site.name,
            f"{', '.join(site.producers)} -> {', '.join(site.consumers)}",
            site.form or "none",
            "yes" if site.shift else "no",
        )
        for site in sites
    )
    return Table(("fold site", "between", "transform", "shift"), rows)


def site_reasons(sites: Sequence[Site]) -> list[str]:
    """Once each, why there is no other form: `no affine, no shift at up_to_down: ...`."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for site in sites:
        refused = {"transform": site.reason} if site.reason else {}
        for form, why in (refused | site.refused).items():
            reasons.setdefault(why, {}).setdefault(f"no {form}", []).append(site.name)
    return [
        f"{', '.join(found)} at {', '.join(dict.fromkeys(name for names in found.values() for name in names))}: {why}"
        for why, found in reasons.items()
    ]


def online_lines(online: Sequence[OnlineCost]) -> list[str]:
    """What stays in the program instead of folding, and what it takes."""
    return [
        f"not folded, in the program: {cost.name}, matrices of {cost.size}: {cost.macs:,} multiplications more a "
        f"token, {cost.share:.1%} of those of the blocks' linears, {cost.bytes / 1e6:,.2f} MB of float32"
        for cost in online
    ]


def protocol_line(report: ValidationReport) -> str:
    """The protocol of the figures, in one sentence."""
    p = report.protocol
    tokens = f"windows of {p.window} tokens, stride {p.stride}, {'with' if p.bos else 'no'} BOS"
    corpus = f"{p.corpus} (sha256 {p.digest[:12]}), {p.windows} of {p.windows_in_corpus}"
    return f"{corpus} {tokens}, tokenizer {p.tokenizer_digest[:12]}"


def cache_line(cache: Cache) -> str:
    """What the KV cache holds, and what 1,000 tokens take in it."""
    floats = f"{size_mb(1000 * cache.float_token_bytes)} per 1,000 tokens"
    if cache.bits == FLOAT_BITS:
        return f"float32, {floats}"
    of = f" of {cache.group} numbers" if cache.group else ""
    share = f"{cache.token_bytes / cache.float_token_bytes:.1%}"
    return (
        f"int{cache.bits}, a grid per token and head{of}: {size_mb(1000 * cache.token_bytes)} per 1,000 tokens, "
        f"{share} of float32's {size_mb(1000 * cache.float_token_bytes)}"
    )


def size_mb(bytes_: int) -> str:
    """Megabytes with two digits."""
    return f"{bytes_ / 1e6:.2f} MB"


def figure(perplexity: Perplexity | None) -> str:
    """Perplexity with its standard error."""
    return f"{perplexity.value:.3f} ± {perplexity.stderr:.3f}" if perplexity else "skipped"


def number(value: float | None, form: str) -> str:
    """`value` formatted, or the sign for a missing one."""
    return MISSING if value is None else format(value, form)


def _exactness(layer: LayerReport) -> str:
    if layer.exact:
        return "bit for bit"
    return "DEPARTS" if not layer.passed else f"within {number(layer.max_relative_error, '.0e')}"


def _escape(cell: str) -> str:
    """No cell breaks its table."""
    return " ".join(cell.replace("|", "\\|").split())
