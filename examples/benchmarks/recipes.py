"""Exported perplexity of several recipes on one model, on the same tokens, as one table.

    python examples/benchmarks/recipes.py --model SmolLM2-135M-Instruct.Q4_1.gguf --calib wiki.valid.raw \
        --eval wiki.test.raw --out runs --recipe w8a8-dynamic+rtn --recipe w4a8-g32+rtn --recipe w4a8-g32 \
        --set samples.length=512 --set samples.windows=32

Every row is a whole run (calibrate to validated file) in its own folder below --out; rows whose folder stands are not
computed again. Figures are read from each bundle's report.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from afq_export.report.tables import Table
from afq_export.spec.report import ValidationReport, read_report


def main() -> None:
    arguments = parse()
    rows = []
    for recipe in arguments.recipe:
        report = run(recipe, arguments)
        if report is not None:
            rows.append(row(recipe, report))
    header = ("recipe", "float", "fake-quant", "integer", "exported", "over float", "agreement", "MB", "calibrate s",
              "export s", "peak MB", "verdict")
    print(Table(header, tuple(rows)).markdown())


def run(recipe: str, arguments: argparse.Namespace) -> ValidationReport | None:
    """The report of one recipe's run; None when the run failed before it had one."""
    out = Path(arguments.out) / recipe
    report = out / "bundle" / "report.json"
    if not report.exists():
        command = [sys.executable, "-m", "afq_export", "run", "--model", arguments.model, "--recipe", recipe,
                   "--calib", arguments.calib, "--eval", arguments.eval, "--target", arguments.target,
                   "--out", str(out), "--threads", str(arguments.threads)]
        for change in arguments.set:
            command += ["--set", change]
        print("$", *command, file=sys.stderr, flush=True)
        subprocess.run(command, check=False)
    return read_report(report.read_bytes()) if report.exists() else None


def row(recipe: str, report: ValidationReport) -> tuple[str, ...]:
    """The table's cells."""
    values = {name: figure.value for name, figure in report.perplexity.items() if figure is not None}
    cost, artifact = report.cost, report.artifact
    return (
        recipe,
        *(f"{values[name]:.3f}" if name in values else "-" for name in ("float", "fake_quant", "integer", "runtime")),
        f"{values['runtime'] / values['float'] - 1:+.2%}",
        f"{report.agreement.top1:.3%}",
        f"{artifact.bytes / 1e6:.1f}",
        f"{cost.calibrate_s:.0f}",
        f"{cost.export_s:.0f}",
        f"{cost.peak_rss_mb:.0f}",
        report.verdict,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--target", default="android-xnnpack")
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
