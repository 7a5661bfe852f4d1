"""Exported perplexity of several recipes on one model, on the same tokens, as one table.

    python examples/benchmarks/recipes.py --model SmolLM2-135M-Instruct.Q4_1.gguf --calib wiki.valid.raw \
        --eval wiki.test.raw --out runs --recipe w8a8-dynamic+rtn --recipe w4a8-g32+rtn --recipe w4a8-g32 \
        --set samples.length=512 --set samples.windows=32

Every row is a whole run (calibrate to validated file) in its own folder below --out; a row whose report stands is not
computed again, one that was stopped goes on. Figures are read from each bundle's report.json; "over float" has the
standard error of the exported perplexity, as a part of the float one, in brackets.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from afq_export.report.tables import Table
from afq_export.spec.report import Perplexity, ValidationReport, read_report

HEADER = (
    "recipe",
    "float",
    "fake-quant",
    "integer",
    "exported",
    "over float",
    "argmax as integer",
    "bit for bit",
    "exact linears",
    "tokens",
    "MB",
    "calibrate s",
    "export s",
    "peak MB",
    "verdict",
)
MISSING = "-"


def main() -> int:
    """Prints the table of all rows that have a report. Exit code 1 when a row has none or did not pass."""
    arguments = parse()
    reports = {recipe: run(recipe, arguments) for recipe in arguments.recipe}
    rows = [row(recipe, report) for recipe, report in reports.items() if report]
    print(Table(HEADER, tuple(rows), frozenset(range(1, len(HEADER) - 1))).markdown())
    return 0 if all(report and report.verdict == "pass" for report in reports.values()) else 1


def run(recipe: str, arguments: argparse.Namespace) -> ValidationReport | None:
    """The report of one recipe's run; None when the run ended before it had one (its error line has been printed)."""
    out = Path(arguments.out) / recipe
    report = out / "bundle" / "report.json"
    if not report.exists():
        command = command_of(recipe, out, arguments)
        print("$", *command, file=sys.stderr, flush=True)
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    return read_report(report.read_bytes()) if report.exists() else None


def command_of(recipe: str, out: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line of one row."""
    options = {
        "--model": arguments.model,
        "--recipe": recipe,
        "--calib": arguments.calib,
        "--eval": arguments.eval,
        "--target": arguments.target,
        "--window": arguments.window,
        "--windows": arguments.windows,
        "--threads": arguments.threads,
        "--out": out,
    }
    given = [part for option, value in options.items() if value for part in (option, str(value))]
    changes = [part for change in arguments.set for part in ("--set", change)]
    return [sys.executable, "-m", "afq_export", "run", *given, *changes]


def row(recipe: str, report: ValidationReport) -> tuple[str, ...]:
    """The table's cells."""
    figures = dict(report.perplexity.items())
    plain, exported = figures.get("float"), figures.get("runtime")
    agreement, cost = report.agreement, report.cost
    return (
        recipe,
        *(value(figures.get(rung)) for rung in ("float", "fake_quant", "integer", "runtime")),
        over_float(plain, exported),
        share(agreement.top1),
        share(agreement.bit_for_bit),
        f"{sum(bool(layer.exact) for layer in report.layers)} of {len(report.layers)}",
        str(exported.tokens) if exported else MISSING,
        f"{report.artifact.bytes / 1e6:.2f}" if report.artifact else MISSING,
        *(MISSING if spent is None else f"{spent:.0f}" for spent in (cost.calibrate_s, cost.export_s)),
        MISSING if cost.peak_rss_mb is None else f"{cost.peak_rss_mb:.0f}",
        report.verdict,
    )


def value(figure: Perplexity | None) -> str:
    """A perplexity."""
    return MISSING if figure is None else f"{figure.value:.3f}"


def over_float(plain: Perplexity | None, exported: Perplexity | None) -> str:
    """What the exported file's perplexity is above the float model's, and the standard error of either."""
    if plain is None or exported is None:
        return MISSING
    return f"{exported.value / plain.value - 1:+.2%} (±{exported.stderr / plain.value:.1%})"


def share(part: float | None) -> str:
    """A part of all tokens."""
    return MISSING if part is None else f"{part:.2%}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", required=True, help="one folder a recipe is made in it")
    parser.add_argument("--target", default="android-xnnpack")
    parser.add_argument("--recipe", action="append", required=True, help="may be repeated: one row each")
    parser.add_argument("--set", action="append", default=[], help="change of a recipe field, for all rows")
    parser.add_argument("--window", type=int, help="tokens of an evaluation window (default: 512, less if need be)")
    parser.add_argument("--windows", help="evaluation windows, or all (default: 40)")
    parser.add_argument("--threads", type=int, help="default: all cores")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
