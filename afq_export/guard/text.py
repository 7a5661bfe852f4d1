"""What `check` found, for a reader: on the terminal, and as Markdown. And a baseline's history."""

from __future__ import annotations

import re

from afq_export.guard.gates import bits, percent
from afq_export.report.tables import Table, size_mb
from afq_export.spec.baseline import Baseline, Drift
from afq_export.spec.guard import CheckReport, Departure, Difference

SHORT = 44
"""Letters of a fact that are shown."""
ABSENT = "absent"
DIGEST, DIGITS = re.compile(r"\b[0-9a-f]{64}\b"), 12
"""A sha256, and how much of it is shown."""


def headline(report: CheckReport) -> str:
    """The verdict, what it is of, and the gates that make it what it is, in one line."""
    facts = report.facts
    line = "  ".join((report.verdict.upper(), facts.model.name, facts.recipe, facts.target))
    against = [gate.name for gate in report.gates if gate.status in ("failed", "inconclusive")]
    return f"{line}  ({', '.join(against)})" if against else line


def text(report: CheckReport) -> str:
    """Verdict first, then the gates, what differs, where it departs, and by what protocol."""
    parts = [headline(report), gates_table(report).text()]
    if report.differences:
        parts.append(differences_table(report).text())
    if report.worst and report.verdict != "pass":
        parts.append(worst_table(report).text())
    return "\n\n".join((*parts, "\n".join(f"{name.ljust(10)}  {value}" for name, value in _lines(report).items())))


def markdown(report: CheckReport) -> str:
    """The same for a page: GitHub's step summary."""
    parts = [f"## {headline(report)}", gates_table(report).markdown()]
    if report.differences:
        parts.append(f"### Not as in the baseline\n\n{differences_table(report).markdown()}")
    if report.worst and report.verdict != "pass":
        parts.append(f"### Where the loss rose most\n\n{worst_table(report).markdown()}")
    parts.append("\n".join(f"- {name}: {_code(value)}" for name, value in _lines(report).items()))
    return "\n\n".join(parts) + "\n"


def gates_table(report: CheckReport) -> Table:
    """One row per gate."""
    return Table(("gate", "status", "detail"), tuple((g.name, g.status, g.detail) for g in report.gates))


def differences_table(report: CheckReport) -> Table:
    """One row per fact that differs."""
    rows = tuple((d.name, _short(d.was), _short(d.now)) for d in report.differences)
    return Table(("differs", "baseline", "now"), rows)


def worst_table(report: CheckReport) -> Table:
    """One row per window that is named."""
    rows = tuple((*_place(d), f"{d.was:.3f}", f"{d.now:.3f}", _quoted(d)) for d in report.worst)
    return Table(("window", "token", "loss was", "is", "text"), rows, frozenset({0, 1, 2, 3}))


def differences_line(differences: tuple[Difference, ...]) -> str:
    """The facts that differ, in one line; empty when none does."""
    return "; ".join(f"{d.name}: {_short(d.was)} -> {_short(d.now)}" for d in differences)


def baseline_text(baseline: Baseline) -> str:
    """What a baseline holds and how it came about."""
    facts, protocol = baseline.facts, baseline.protocol
    figure = facts.perplexity
    lines = {
        "baseline": f"{facts.model.name}  {facts.recipe}  {facts.target}",
        "perplexity": f"{figure.value:.4f} ± {figure.stderr:.4f} ({figure.tokens} tokens predicted)",
        "file": f"{facts.artifact.name}, {size_mb(facts.artifact.bytes)}, sha256 {facts.artifact.sha256}",
        "runtime": f"{facts.runtime} {facts.versions.get(facts.runtime, '')} on {facts.machine.cpu}, "
        f"{facts.machine.threads} threads",
        "corpus": f"{protocol.corpus}, sha256 {protocol.digest}",
        "windows": f"{protocol.windows} of {protocol.windows_in_corpus}, {protocol.window} tokens each",
        "tokenizer": f"sha256 {protocol.tokenizer_digest}",
        "first made": baseline.created,
    }
    if facts.speed:
        lines["speed"] = f"prefill {facts.speed.prefill:.0f}, decode {facts.speed.decode:.0f} tokens/s"
    shown = "\n".join(f"{name.ljust(10)}  {value}" for name, value in lines.items())
    return f"{shown}\n\n{history_table(baseline).text()}" if baseline.updates else f"{shown}\nupdates     none"


def history_table(baseline: Baseline) -> Table:
    """One row per update: the perplexity before, and the drift it accepted."""
    rows = tuple(
        (
            u.date,
            u.who,
            u.what,
            u.why,
            f"{u.before.perplexity.value:.4f}",
            _drift(u.drift),
            _drift(u.cumulative),
            f"{u.top1:.2%}",
        )
        for u in baseline.updates
    )
    header = ("date", "who", "what", "why", "perplexity before", "drift", "since the first", "top-1")
    return Table(header, rows, frozenset({4, 5, 6, 7}))


def _lines(report: CheckReport) -> dict[str, str]:
    now, before, p = report.perplexity, report.baseline_perplexity, report.protocol
    windows = f"{p.windows} of {p.windows_in_corpus} windows of {p.window} tokens"
    return {
        "perplexity": f"{now.value:.4f}, was {before.value:.4f} ({now.tokens} tokens, paired)",
        "bits": bits(report.identical, report.first_other),
        "text": f"{p.corpus} (sha256 {p.digest[:12]}), {windows}",
        "baseline": report.baseline,
        "bundle": report.bundle,
    } | ({"device": f"{report.device}, {report.facts.machine.cpu}"} if report.device else {})


def _drift(drift: Drift) -> str:
    return f"{percent(drift.value)} ± {percent(drift.stderr, '')}"


def _place(departure: Departure) -> tuple[str, str]:
    return str(departure.window), str(departure.position)


def _quoted(departure: Departure) -> str:
    """The text before and, in brackets, the token, on one line."""
    shown = f"{departure.before}[{departure.token}]"
    return "".join(letter if letter.isprintable() else "\N{SYMBOL FOR NEWLINE}" for letter in shown)


def _short(value: str | None) -> str:
    if value is None:
        return ABSENT
    value = DIGEST.sub(lambda found: found[0][:DIGITS], value)
    return value if len(value) <= SHORT else f"{value[: SHORT - 3]}..."


def _code(value: str) -> str:
    return f"`{value.replace('`', '')}`"
