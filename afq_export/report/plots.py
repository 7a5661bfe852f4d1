"""The plots of a report as SVG text, drawn by matplotlib: real text, no script, the same bytes for the same figures.

Colours are names of the page (`var(--ink)`), so that one drawing fits light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from afq_export.report.tables import RUNG_TITLES
from afq_export.spec.history import History
from afq_export.spec.report import LayerReport, ValidationReport

INK, MUTED, GRID, FIRST, SECOND, THIRD = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
NAMES = {INK: "ink", MUTED: "muted", GRID: "line", FIRST: "first", SECOND: "second", THIRD: "third"}
"""Colours that stand for the page's own."""
WIDTH = 4.4
"""Inches: drawn for a phone's width, so that text keeps its size there."""
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
SERIES = (FIRST, SECOND, THIRD)
MARKS = ("o", "s", "^")


def rungs_plot(reports: Mapping[str, ValidationReport]) -> str:
    """Perplexity of every rung with its standard error; one series per report, named by its key."""
    rungs = [rung for rung, _ in next(iter(reports.values())).perplexity.items()]
    with _drawing(0.42 * len(rungs) + 0.9) as (figure, axes):
        for index, (name, report) in enumerate(reports.items()):
            shift = 0.22 * (index - (len(reports) - 1) / 2)
            found = [(row + shift, p) for row, (_, p) in enumerate(report.perplexity.items()) if p]
            axes.errorbar(
                [p.value for _, p in found],
                [row for row, _ in found],
                xerr=[p.stderr for _, p in found],
                fmt=MARKS[index],
                color=SERIES[index],
                capsize=3,
                markersize=5,
                label=name,
            )
        axes.set_yticks(range(len(rungs)), [RUNG_TITLES[rung] for rung in rungs])
        axes.set_ylim(len(rungs) - 0.5, -0.5)
        axes.set_xlabel("perplexity ± standard error")
        if len(reports) > 1:
            figure.legend(loc="outside upper left", ncols=2)
        return _svg(figure, "rungs")


def losses_plot(history: Sequence[History]) -> str:
    """Relative error of each block's output: rounded only, at the start values, as kept."""
    blocks = np.arange(len(history))
    with _drawing(2.6) as (figure, axes):
        series = {"rounded only": "rounded_loss", "start values": "start_loss", "kept": "final_loss"}
        for colour, mark, (label, field) in zip(SERIES, MARKS, series.items(), strict=True):
            values = [getattr(block, field) for block in history]
            axes.plot(blocks, values, color=colour, marker=mark, markersize=3.5, linewidth=1.2, label=label)
        _blocks_axis(axes, len(history))
        axes.set_yscale("log")
        axes.set_ylabel("relative error of the output")
        figure.legend(loc="outside upper left", ncols=3)
        return _svg(figure, "losses")


def epochs_plot(history: Sequence[History]) -> str:
    """Mean training loss of every block by epoch, over that of its first: dark blocks first. Empty without epochs."""
    learned = [(index, block) for index, block in enumerate(history) if block.epochs]
    if not learned:
        return ""
    with _drawing(2.6) as (figure, axes):
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(learned)))
        for shade, (index, block) in zip(shades, learned, strict=True):
            losses = [epoch.loss for epoch in block.epochs]
            share = np.array(losses) / max(losses[0], 1e-30)
            axes.plot(
                range(1, 1 + len(losses)),
                share,
                color=shade,
                marker=".",
                markersize=3,
                linewidth=1.2,
                label=f"block {index}",
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss over the first epoch's")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(learned) <= 6:
            figure.legend(loc="outside upper left", ncols=3)
        return _svg(figure, "epochs")


def health_plot(history: Sequence[History]) -> str:
    """Least dominance margin and largest condition number of each block's transforms. Empty without epochs."""
    learned = [(index, block.epochs) for index, block in enumerate(history) if block.epochs]
    if not learned:
        return ""
    blocks = [index for index, _ in learned]
    with _drawing(2.6) as (figure, axes):
        margins = [min(epoch.dominance for epoch in epochs) for _, epochs in learned]
        axes.plot(blocks, margins, color=FIRST, marker="o", markersize=3.5, linewidth=1.2, label="dominance margin")
        axes.set_ylabel("dominance margin (0: lost)")
        axes.set_ylim(bottom=min(0.0, *margins))
        other = axes.twinx()
        worst = [max(epoch.condition for epoch in epochs) for _, epochs in learned]
        other.plot(blocks, worst, color=SECOND, marker="s", markersize=3.5, linewidth=1.2, label="condition number")
        other.set_ylabel("condition number")
        other.set_yscale("log")
        other.grid(False)
        _blocks_axis(axes, len(history))
        figure.legend(loc="outside upper left", ncols=2)
        return _svg(figure, "health")


def layers_plot(layers: Sequence[LayerReport], values: Mapping[str, float | None], label: str, form: str) -> str:
    """Heat map of `values` (by linear) over blocks × linears. Empty when there is nothing to show."""
    inside = [layer.name.split(".") for layer in layers if layer.name.count(".") == 2]
    found = [values.get(".".join(parts)) for parts in inside]
    if not any(value is not None for value in found):
        return ""
    roles = list(dict.fromkeys(role for _, _, role in inside))
    blocks = 1 + max(int(block) for _, block, _ in inside)
    grid = np.full((blocks, len(roles)), np.nan)
    for (_, block, role), value in zip(inside, found, strict=True):
        grid[int(block), roles.index(role)] = np.nan if value is None else value
    with _drawing(max(1.7, 0.17 * blocks + 1.2)) as (figure, axes):
        axes.grid(False)
        low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
        mesh = axes.pcolormesh(grid, cmap="viridis", vmin=low, vmax=high if high > low else low + 1, linewidth=0)
        axes.set_xticks(np.arange(len(roles)) + 0.5, [role.removesuffix("_proj") for role in roles], rotation=35)
        _block_labels(axes, blocks)
        if grid.size <= 64:
            for (row, column), value in np.ndenumerate(grid):
                if not np.isnan(value):
                    dark = (value - low) < 0.6 * (high - low)
                    colour = "white" if dark else "black"
                    text = format(value, form)
                    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=colour)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(label)
        return _svg(figure, re.sub(r"\W+", "-", label))


class _drawing:
    """A figure `height` inches high in the page's style, and its axes."""

    def __init__(self, height: float) -> None:
        self._height, self._context = height, matplotlib.rc_context(STYLE)

    def __enter__(self) -> tuple[Figure, Any]:
        self._context.__enter__()
        figure = Figure(figsize=(WIDTH, self._height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        return figure, axes

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)


def _blocks_axis(axes: Axes, blocks: int) -> None:
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(-0.5, blocks - 0.5)


def _block_labels(axes: Axes, blocks: int) -> None:
    """Block 0 on top, and a label for each or for every few."""
    step = max(1, blocks // 16)
    shown = range(0, blocks, step)
    axes.set_yticks([index + 0.5 for index in shown], [str(index) for index in shown])
    axes.set_ylabel("block")
    axes.invert_yaxis()


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `svg` element whose ids no other drawing of the page has."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for colour, variable in NAMES.items():
        drawing = drawing.replace(colour, f"var(--{variable})")
    drawing = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", drawing)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", drawing, count=2)
