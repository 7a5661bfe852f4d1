"""Exported files against quality bars: perplexity over the float model's, all on the same tokens, in one run.

    python examples/benchmarks/bars.py --model SmolLM2-135M-Instruct.Q4_1.gguf --calib wiki.valid.raw \
        --eval wiki.test.raw --out runs --threads 2 \
        --row android-xnnpack:w4a8-g32+fast:8 --row android-xnnpack:w4a8-g32+best:6.5 \
        --row linux-x64-ort:w3a16-g128+fast:40

A row is TARGET:RECIPE:BAR, the bar in percent over float. Each is one `afq-export lower` in its own folder below --out
(a bundle that stands is not made again, a run that was stopped goes on); then the float model and every file are
measured, each file through its runtime. Exit code 1 when a file is above its bar. In brackets: the standard error of
the difference from float, paired by window. Seconds and memory are those of the calibration, as run.json has them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

from afq_export.guard.compare import paired
from afq_export.machine import default_threads, settle
from afq_export.perplexity import Subject, open_subject, windows_for
from afq_export.report.tables import Table
from afq_export.runfolder import RunFolder
from afq_export.validate.evaluate import TokenStats, measure_one

HEADER = ("recipe", "target", "perplexity", "over float", "bar", "", "MB", "calibrate s", "peak MB")


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row: `most` percent over float."""

    target: str
    recipe: str
    most: float


def main() -> int:
    """Prints the table. Exit code 1 when a file is above its bar."""
    arguments = parse()
    settle(arguments.threads)
    folders = {bar: lowered(bar, arguments) for bar in arguments.row}
    plain = open_subject(arguments.model)
    windows = windows_for(plain, arguments.eval, arguments.window, arguments.windows)
    reference = measure_one(plain.model, windows.ids_NT)
    count = f"{windows.ids_NT.shape[0]} windows of {windows.length} tokens"
    print(f"float {reference.perplexity.value:.3f}, {count}, {arguments.threads} thread(s)\n")
    rows, passed = [], True
    for bar, folder in folders.items():
        subject = open_subject(str(folder))
        cells, held = row(bar, folder, subject, measure_one(subject.model, windows.ids_NT), reference)
        rows.append(cells)
        passed &= held
    print(Table(HEADER, tuple(rows), frozenset({2, 3, 4, 6, 7, 8})).markdown())
    return 0 if passed else 1


def lowered(bar: Bar, arguments: argparse.Namespace) -> Path:
    """The run folder of a row, with its bundle. One of other inputs is refused by `lower`."""
    out = Path(arguments.out) / f"{bar.target}-{Path(bar.recipe).stem}"
    command = [sys.executable, "-m", "afq_export", "lower", "--target", bar.target, "--recipe", bar.recipe]
    command += ["--model", arguments.model, "--calib", arguments.calib, "--eval", arguments.eval]
    command += ["--threads", str(arguments.threads), "--out", str(out)]
    print("$", *command, file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def row(
    bar: Bar, folder: Path, subject: Subject, found: TokenStats, reference: TokenStats
) -> tuple[tuple[str, ...], bool]:
    """The table's cells, and whether the bar is held."""
    difference = paired(found.nll.numpy(), reference.nll.numpy())
    ratio = math.exp(difference.mean)
    held = ratio - 1 <= bar.most / 100
    run = RunFolder(folder)
    size = sum(path.stat().st_size for path in (folder / "bundle").glob("model.*") if path.suffix in (".pte", ".onnx"))
    costs = (f"{run.cost('calibrate', 'seconds') or 0:.0f}", f"{run.cost('calibrate', 'peak_rss_mb') or 0:.0f}")
    over = f"{ratio - 1:+.2%} (±{ratio * difference.stderr:.2%})"
    verdict = "held" if held else "ABOVE"
    figures = (f"{found.perplexity.value:.3f}", over, f"{bar.most:+g}%", verdict, f"{size / 1e6:.1f}")
    return (bar.recipe, bar.target, *figures, *costs), held


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--row", action="append", required=True, type=_bar, help="TARGET:RECIPE:PERCENT")
    parser.add_argument("--window", type=int, help="tokens of an evaluation window (default: 512, less if need be)")
    parser.add_argument("--windows", type=int, help="evaluation windows (default: 40; 0: all)")
    parser.add_argument("--threads", type=int, default=default_threads())
    return parser.parse_args()


def _bar(text: str) -> Bar:
    target, recipe, most = text.split(":")
    return Bar(target, recipe, float(most))


if __name__ == "__main__":
    sys.exit(main())
