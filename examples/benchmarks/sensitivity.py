"""How well damages predict: each linear alone on each grid, `afq-export sensitivity` against what really happens.

    python examples/benchmarks/sensitivity.py --model ../shared/data/stories260K \
        --calib examples/benchmarks/corpora/tinystories-first-half.toml \
        --eval examples/benchmarks/corpora/tinystories-second-half.toml

Predictions are made on calibration windows. What happens is measured on evaluation windows, in float32 with one linear
rounded to nearest and its input on its grid: KL(float || changed) and the change of the log of the perplexity, both
paired, token by token. Beside our damage stand the relative error of the linear's output and of its block's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.arch.decoder import block, embed, head
from afq_export.arch.ops import FloatOps
from afq_export.calibrate.start import quantize_rows
from afq_export.job import Prepared, open_corpus, prepare
from afq_export.load.corpus import cut_windows
from afq_export.progress import silent
from afq_export.quantize.assign import HEAD
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.quantize.quantize import quantize_embedding
from afq_export.report.tables import Table
from afq_export.sensitivity.damage import rounding_error
from afq_export.sensitivity.measure import measure
from afq_export.sensitivity.options import ROWS, Options, find_options
from afq_export.spec.request import Request

MEASURES = ("damage", "linear's output", "block's output")


class ChangedOps(FloatOps):
    """Float, but for one linear."""

    def __init__(self, ops: FloatOps, role: str, record: LinearRecord) -> None:
        super().__init__(ops.config, ops.weights)
        weight = self.weights[f"{role}.weight"]
        self.role, self.record, self.changed = role, record, weight + rounding_error(weight, record.spec.weight)
        self.error = 0.0

    def linear(self, role: str, x: Tensor) -> Tensor:
        if role != self.role:
            return super().linear(role, x)
        activation = self.record.spec.activation
        y = F.linear(quantize_rows(x, activation), self.changed, self.weights.get(f"{role}.bias"))
        self.error = relative(y, super().linear(role, x))
        return y


class Model:
    """A small model in memory, and what enters each of its blocks on some windows."""

    def __init__(self, job: Prepared, ids_NT: Tensor) -> None:
        model = job.model
        self.config, self.ids = model.config, ids_NT
        self.ops = [FloatOps(self.config, model.block(index)) for index in range(self.config.layers)]
        self.head, self.embedding = FloatOps(self.config, model.head()), model.embedding()
        self.inputs = [embed(self.config, self.embedding, ids_NT)]
        for ops in self.ops:
            self.inputs.append(block(self.config, ops, self.inputs[-1]))

    def log_probabilities(self, x: Tensor, first: int, last: FloatOps | None = None) -> Tensor:
        """Float64 [N, T-1, V] from what enters block `first`."""
        for ops in self.ops[first:]:
            x = block(self.config, ops, x)
        return head(last or self.head, x)[:, :-1].double().log_softmax(-1)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    request = Request(
        target=arguments.target, model=arguments.model, recipe=arguments.recipe, changes=tuple(arguments.set),
        calib=arguments.calib,
    )  # fmt: skip
    job = prepare(request)
    options = find_options(job)
    damages = measure(job, options, silent)
    evaluation = cut_windows(open_corpus(arguments.eval), job.tokenizer, "", arguments.window, arguments.windows)
    rows = list(compare(job, options, damages, evaluation.ids_NT))
    print(f"{job.model.name}: {len(rows)} pairs of a linear and a grid, {evaluation.ids_NT.numel()} tokens\n")
    print(summary(rows).markdown())


@torch.no_grad()
def compare(job: Prepared, options: Options, damages, ids_NT: Tensor) -> Iterator[dict[str, float | str]]:
    """A row per linear and grid: what is predicted and what happens."""
    calibration, model = Model(job, job.calibration.ids_NT), Model(job, ids_NT)
    base = model.log_probabilities(model.inputs[0], 0)
    for name, records in options.linears.items():
        for record, damage in zip(records, damages[name], strict=True):
            role, index = record.spec.role, record.spec.block
            here, there = (one(m, index, role, record) for m in (calibration, model))
            if index is None:
                x, last = model.inputs[-1], there
                of_block = math.nan
            else:
                x, last = block(model.config, there, model.inputs[index]), None
                of_block = relative(block(model.config, here, calibration.inputs[index]), calibration.inputs[index + 1])
            first = model.config.layers if index is None else index + 1
            happened = outcome(base, model.log_probabilities(x, first, last), ids_NT)
            if index is None:
                head(here, calibration.inputs[-1])
            errors = dict(zip(MEASURES, (damage, here.error, of_block), strict=True))
            yield {"name": name, "grid": str(record.spec.weight)} | errors | happened
    for rows, damage in zip(options.rows, damages[ROWS], strict=True):
        if rows.bits == 32:
            continue
        weights = dict(model.embedding)
        weights["embed_tokens.weight"] = quantize_embedding(weights["embed_tokens.weight"], rows).dequantized()
        changed = model.log_probabilities(embed(model.config, weights, ids_NT), 0)
        yield {"name": ROWS, "grid": f"rows int{rows.bits}", "damage": damage} | outcome(base, changed, ids_NT)


def one(model: Model, index: int | None, role: str, record: LinearRecord) -> ChangedOps:
    """The block's operations with this linear changed."""
    return ChangedOps(model.head if index is None else model.ops[index], HEAD if index is None else role, record)


def outcome(base: Tensor, changed: Tensor, ids_NT: Tensor) -> dict[str, float]:
    """Means per token of KL(base || changed) and of the loss' change, and the latter's standard error over windows."""
    targets = ids_NT[:, 1:, None]
    more = (base.gather(2, targets) - changed.gather(2, targets))[..., 0].mean(1)
    kl = float((base.exp() * (base - changed)).sum(-1).mean())
    return {"kl": kl, "loss": float(more.mean()), "stderr": float(more.std() / len(more) ** 0.5)}


def relative(y: Tensor, reference: Tensor) -> float:
    """Squared error over squared size."""
    return float((y - reference).square().sum() / reference.square().sum())


def summary(rows: list[dict]) -> Table:
    """Rank correlations: of all pairs, of those that move the loss for certain, and of each grid."""
    linears = [row for row in rows if MEASURES[1] in row]
    groups = {"all, token rows too": rows, "all linears": linears}
    groups["loss moved by 2 stderr"] = [row for row in linears if row["loss"] > 2 * row["stderr"]]
    groups |= {grid: [r for r in linears if r["grid"] == grid] for grid in dict.fromkeys(r["grid"] for r in linears)}
    cells = []
    for title, members in groups.items():
        line = [title, str(len(members)), rank(members, "kl", "loss")]
        line += [rank(members, measured, happened) for measured in MEASURES for happened in ("kl", "loss")]
        ratios = np.log([row["damage"] / row["kl"] for row in members])
        line.append(f"{math.exp(np.median(ratios)):.2f} (x {math.exp(ratios.std()):.2f})")
        cells.append(tuple(line))
    columns = [f"{measured}: {happened}" for measured in MEASURES for happened in ("KL", "loss")]
    header = ("of", "pairs", "KL: loss", *columns, "damage / KL")
    return Table(header, tuple(cells), frozenset(range(1, len(header))))


def rank(rows: list[dict], one: str, other: str) -> str:
    """Spearman's correlation, of the rows in which both are known."""
    pairs = np.array([(r[one], r[other]) for r in rows if not math.isnan(r.get(one, math.nan))])
    if len(pairs) < 3:
        return "-"
    ranks = pairs.argsort(0).argsort(0)
    return f"{np.corrcoef(ranks.T)[0, 1]:.3f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--target", default="android-xnnpack")
    parser.add_argument("--recipe", default="w4a8-g32+rtn")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--calib", default="demo-calibration")
    parser.add_argument("--eval", default="demo-evaluation")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
