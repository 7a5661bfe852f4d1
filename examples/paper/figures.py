"""results.json, results.md and the two figures from what reproduce.py has made.

    python examples/paper/figures.py afq-out/paper --to examples/paper

figure2.svg: the loss of every block over the epochs, diagonals alone (OmniQuant) and with matrices (AffineQuant).
figure6.svg: the exported perplexity over the stability factor, and what became of diagonal dominance.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import msgspec
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from reproduce import METHODS, SCHEMES, Row

from afq_export.files import write_text
from afq_export.guard.compare import paired
from afq_export.report.tables import Table

MODELS = ("stories260K", "demo-llama", "demo-opt", "SmolLM2-135M")
ORDER = tuple(METHODS)
"""The expected order, the worst first."""
PAIRS = tuple((better, worse) for worse, better in itertools.pairwise(ORDER))
COLOURS = {"OmniQuant": "tab:orange", "AffineQuant": "tab:blue"}
FAR = 10
"""A perplexity this many times the float model's is given as a factor."""
SURE = 2.0
"""Standard errors from which a difference counts."""


def main() -> int:
    """Writes all four files. Exit code 1 when there is no row."""
    arguments = parse()
    rows = read(arguments.runs)
    if not rows:
        print(f"no figures below {arguments.runs}", file=sys.stderr)
        return 1
    to: Path = arguments.to or arguments.runs
    write_text(to / "results.json", one_a_line(rows))
    write_text(to / "results.md", tables(rows) + "\n")
    loss_curves(rows, arguments.model, to / "figure2.svg")
    sweep(rows, to / "figure6.svg")
    print(tables(rows))
    return 0


def read(folder: Path) -> list[Row]:
    """All rows below `folder`, in a fixed order."""
    paths = [*folder.glob("*/float.json"), *folder.glob("*/*/figures.json")]
    rows = [msgspec.json.decode(path.read_bytes(), type=Row) for path in paths]
    methods, schemes = ("float", *METHODS), ("float", *SCHEMES)
    known = [row for row in rows if row.model in MODELS and row.method in methods]
    return sorted(
        known,
        key=lambda row: (
            MODELS.index(row.model),
            schemes.index(row.scheme),
            row.stability_factor is not None,
            methods.index(row.method),
            row.stability_factor or 0.0,
            row.seed,
        ),
    )


def one_a_line(rows: Sequence[Row]) -> str:
    """JSON, a line for each row."""
    return "[\n" + ",\n".join(msgspec.json.encode(row).decode() for row in rows) + "\n]\n"


def find(rows: Sequence[Row], model: str, scheme: str, method: str) -> Row | None:
    """The row of the comparison (none of the sweep, nor of another seed)."""
    asked = (model, scheme, method, None, 0)
    return next((r for r in rows if (r.model, r.scheme, r.method, r.stability_factor, r.seed) == asked), None)


def tables(rows: Sequence[Row]) -> str:
    """A table of perplexities for every model, the differences that the order is about, and the sweep."""
    parts = []
    for model in MODELS:
        plain = find(rows, model, "float", "float")
        if plain is None:
            continue
        schemes = [s for s in SCHEMES if any(find(rows, model, s, method) for method in METHODS)]
        body = tuple((method, *(cell(find(rows, model, s, method), plain) for s in schemes)) for method in METHODS)
        table = Table(("method", *schemes), body, frozenset(range(1, len(schemes) + 1)))
        title = f"{model}: float {plain.perplexity.value:.3f} on {plain.perplexity.tokens} tokens"
        parts += [title, table.markdown()]
        order = [
            (f"{one} against {other}", *(against(rows, model, scheme, one, other) for scheme in schemes))
            for one, other in PAIRS
        ]
        order.append(("block losses of the last pair", *(block_losses(rows, model, scheme) for scheme in schemes)))
        parts.append(Table(("", *schemes), tuple(order), table.right).markdown())
    return "\n\n".join([*parts, *seed_tables(rows), *sweep_tables(rows)])


def cell(row: Row | None, plain: Row) -> str:
    """Perplexity and how far it is over the float model's."""
    if row is None:
        return "-"
    ratio = row.perplexity.value / plain.perplexity.value
    return f"{row.perplexity.value:.3f} ({f'{ratio - 1:+.1%}' if ratio < FAR else f'x {ratio:.0f}'})"


def against(rows: Sequence[Row], model: str, scheme: str, one: str, other: str) -> str:
    """How far one method's perplexity is from another's, with the paired standard error over the windows."""
    first, second = find(rows, model, scheme, one), find(rows, model, scheme, other)
    if first is None or second is None:
        return "-"
    if len(first.window_nll) < 2:
        return f"{math.expm1(first.window_nll[0] - second.window_nll[0]):+.2%}, one window"
    apart = paired(*(np.array(row.window_nll)[:, None] for row in (first, second)))
    word = "**worse**" if apart.mean > SURE * apart.stderr else "better" if apart.mean < -SURE * apart.stderr else "tie"
    return f"{math.expm1(apart.mean):+.2%} ± {apart.stderr:.2%}, {word}"


def block_losses(rows: Sequence[Row], model: str, scheme: str) -> str:
    """How far AffineQuant's final loss on the calibration text is from OmniQuant's: mean and range over the blocks."""
    found = {row.method: row.calibration for row in chosen(rows, model, scheme)}
    if len(found) < len(COLOURS) or not all(found.values()):
        return "-"
    pairs = zip(found["AffineQuant"], found["OmniQuant"], strict=True)
    apart = [one.final_loss / other.final_loss - 1 for one, other in pairs]
    return f"{statistics.mean(apart):+.1%} ({min(apart):+.1%} to {max(apart):+.1%})"


def seed_tables(rows: Sequence[Row]) -> list[str]:
    """What another order of the same windows does to the methods that learn: the noise of every figure above."""
    learned = [row for row in rows if row.method in COLOURS and row.stability_factor is None]
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in learned:
        groups.setdefault((row.model, row.scheme, row.method), []).append(row.perplexity.value)
    body = tuple(
        (
            *key,
            ", ".join(f"{v:.3f}" for v in values),
            f"{statistics.mean(values):.3f}",
            f"{statistics.stdev(values):.3f}",
        )
        for key, values in groups.items()
        if len(values) > 1
    )
    header = ("model", "scheme", "method", "perplexities", "mean", "standard deviation")
    return ["Other seeds", Table(header, body, frozenset({4, 5})).markdown()] if body else []


def sweep_tables(rows: Sequence[Row]) -> list[str]:
    """The sweeps' rows: factor, perplexity, least dominance margin, and in how many blocks learning was caught."""
    found = [row for row in rows if row.stability_factor is not None]
    if not found:
        return []
    body = tuple(
        (
            row.model,
            row.scheme,
            f"{row.stability_factor:g}",
            f"{row.perplexity.value:.3f}",
            f"{statistics.mean(history.final_loss for history in row.calibration):.4e}",
            f"{margin(row):.3f}",
            f"{caught(row)} of {len(row.calibration)}",
        )
        for row in found
    )
    header = ("model", "scheme", "stability factor", "perplexity", "mean loss", "least margin", "blocks caught")
    return ["The stability factor", Table(header, body, frozenset(range(2, 7))).markdown()]


def margin(row: Row) -> float:
    """The least dominance margin that any epoch of any block had."""
    return min((epoch.dominance for history in row.calibration for epoch in history.epochs), default=1.0)


def caught(row: Row) -> int:
    """Blocks whose learning was stopped and rolled back."""
    return sum(any("rolled back" in event for event in history.events) for history in row.calibration)


def loss_curves(rows: Sequence[Row], model: str, path: Path) -> None:
    """The paper's figure 2: a line of panels per scheme, one per block, loss over epochs."""
    schemes = [scheme for scheme in SCHEMES if all(find(rows, model, scheme, method) for method in COLOURS)]
    if not schemes:
        return
    blocks = len(chosen(rows, model, schemes[0])[0].calibration)
    size = (2.4 * blocks, 2.0 * len(schemes) + 0.6)
    figure, axes = plt.subplots(len(schemes), blocks, figsize=size, squeeze=False, sharex=True)
    for line, scheme in zip(axes, schemes, strict=True):
        for row in chosen(rows, model, scheme):
            for index, (axis, history) in enumerate(zip(line, row.calibration, strict=True)):
                losses = [history.start_loss, *(epoch.loss for epoch in history.epochs)]
                axis.plot(range(len(losses)), losses, color=COLOURS[row.method], label=row.method)
                axis.set_title(f"{scheme}, block {index + 1}", fontsize=8)
                axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("relative squared error of the block's output", fontsize=9)
    figure.suptitle(f"{model}: the loss of each block while it is learned", fontsize=10)
    finish(figure, path)


def chosen(rows: Sequence[Row], model: str, scheme: str) -> list[Row]:
    """The rows of the methods that learn."""
    return [row for method in COLOURS if (row := find(rows, model, scheme, method)) is not None]


def sweep(rows: Sequence[Row], path: Path) -> None:
    """The paper's figure 6: perplexity and dominance margin over the factor, a column per model and scheme."""
    pairs = list(dict.fromkeys((row.model, row.scheme) for row in rows if row.stability_factor is not None))
    if not pairs:
        return
    figure, axes = plt.subplots(
        2, len(pairs), figsize=(4.6 * len(pairs), 5), sharex=True, squeeze=False, height_ratios=(3, 2)
    )
    for column, pair in enumerate(pairs):
        found = [r for r in rows if r.stability_factor is not None and (r.model, r.scheme) == pair]
        _sweep_column(axes[0][column], axes[1][column], found, find(rows, *pair, "OmniQuant"))
        axes[0][column].set_title(", ".join(pair), fontsize=10)
    axes[0][0].set_ylabel("exported perplexity")
    axes[1][0].set_ylabel("least dominance margin")
    finish(figure, path)


def _sweep_column(above: Axes, below: Axes, found: Sequence[Row], diagonal: Row | None) -> None:
    """One model and scheme: its points, OmniQuant's level, and how many blocks were caught."""
    factors = [row.stability_factor or 0.0 for row in found]
    above.plot(
        factors, [row.perplexity.value for row in found], "o-", color=COLOURS["AffineQuant"], label="AffineQuant"
    )
    if diagonal is not None:
        value = diagonal.perplexity.value
        above.axhline(value, color=COLOURS["OmniQuant"], linestyle="--", label="OmniQuant")
    for row in found:
        if caught(row):
            where = (row.stability_factor or 0.0, row.perplexity.value)
            above.annotate(f"{caught(row)} caught", where, textcoords="offset points", xytext=(-4, 7), fontsize=8)
    above.legend(fontsize=8)
    below.plot(factors, [margin(row) for row in found], "o-", color="tab:green")
    below.axhline(0.0, color="black", linewidth=0.8)
    below.set_xlabel("stability factor")
    below.set_xscale("symlog", linthresh=1e-3)


def finish(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Writes the same bytes for the same figure."""
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "afq"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder that reproduce.py wrote to")
    parser.add_argument("--to", type=Path, help="where the files go (default: the same folder)")
    parser.add_argument("--model", default="stories260K", choices=MODELS, help="of figure 2")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
