"""Static activation ranges from the calibration windows: a grid for every static linear's input, and for its output
where the kernel leaves it on one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from afq_export.arch.decoder import block
from afq_export.arch.ops import FloatOps, Weights
from afq_export.calibrate.learn import BlockProblem
from afq_export.calibrate.ops import QuantizedPathOps, seen_range
from afq_export.quantize.activations import dequantize_static, fake_quantize_static, quantize_static, range_grid
from afq_export.quantize.checkpoint import StaticRange

SAMPLES = 1 << 16
"""Values kept per tensor and batch for the search; the extremes are exact."""

Method = Literal["minmax", "mse", "percentile", "output"]

OUTSIDE = 1e-4
"""The part of the values that a percentile range leaves out at either end."""

ROWS = 256
"""Rows of an input that its linears' output errors are measured on."""

SHRINKS = tuple(1 - i / 50 for i in range(41))
"""Fractions of the full range that the search tries: 1.0 down to 0.2."""


class _Observer:
    """Extremes of a tensor over all batches, and a regular sample of it."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        self.samples: list[Tensor] = []
        self.rows: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        flat = x.reshape(-1)
        self.samples.append(flat[:: max(1, len(flat) // SAMPLES)].clone())
        rows = x.reshape(-1, x.shape[-1])
        self.rows.append(rows[:: max(1, len(rows) // ROWS)].clone())

    def grid(self, method: Method) -> StaticRange:
        """The grid over the full range, over all but the OUTSIDE part of the sample at either end, or over the part of
        the range with the least squared error on the sample."""
        if method == "minmax":
            return range_grid(self.low, self.high)
        x = torch.cat(self.samples)
        if method == "percentile":
            ordered, left_out = x.sort().values, int(len(x) * OUTSIDE)
            return range_grid(float(ordered[left_out]), float(ordered[-1 - left_out]))
        return self._least(lambda grid: float((dequantize_static(quantize_static(x, grid), grid) - x).square().mean()))

    def grid_for(self, weights: Sequence[Tensor]) -> StaticRange:
        """The part of the range with the least squared error of what linears [O, I] make of the input.

        A channel of outliers that the linears live on is not clipped, however rare its values are.
        """
        rows = torch.cat(self.rows)
        rows = rows[:: max(1, len(rows) // ROWS)]
        gram_II = sum(weight.T @ weight for weight in weights)

        def error(grid: StaticRange) -> float:
            lost = dequantize_static(quantize_static(rows, grid), grid) - rows
            return float(((lost @ gram_II) * lost).sum())

        return self._least(error)

    def _least(self, error: Callable[[StaticRange], float]) -> StaticRange:
        """The grid with the least error among those that cut off what is larger than a part of the largest value: a
        short end of the range is left whole as long as the long one reaches beyond it."""
        ends = [max(-self.low, self.high) * shrink for shrink in SHRINKS]
        grids = [range_grid(max(self.low, -end), min(self.high, end)) for end in ends]
        return grids[int(torch.tensor([error(grid) for grid in grids]).argmin())]


class _ObservingOps(QuantizedPathOps):
    """The quantized path, with every static linear's input and output watched before they are quantized.

    Linears that share their input share its observer, and so its grid: the program quantizes it once.
    """

    def __init__(self, *args, seen: dict[str, tuple[_Observer, _Observer]]) -> None:
        super().__init__(*args)
        self.seen, self._input, self._role = seen, None, ""

    def linear(self, role: str, x: Tensor) -> Tensor:
        spec = self.records[role].spec
        if spec.activation is None or spec.activation.dynamic:
            return super().linear(role, x)
        if role not in self.seen:
            shared = self.seen[self._role][0] if self._input is x else _Observer()
            self.seen[role] = (shared, _Observer())
        before, after = self.seen[role]
        if self._input is not x:
            before.see(x)
        self._input, self._role = x, role
        y = FloatOps.linear(self, role, fake_quantize_static(x, seen_range(x)))
        after.see(y)
        return fake_quantize_static(y, seen_range(y)) if spec.output == "static" else y


@torch.no_grad()
def observe_ranges(
    problem: BlockProblem, weights: Weights, method: Method, batch: int
) -> dict[str, tuple[StaticRange, StaticRange | None]]:
    """(input, output) grids by role, of the block with its folded and quantized `weights` on its own inputs; no output
    grid where the kernel leaves its result float."""
    seen: dict[str, tuple[_Observer, _Observer]] = {}
    for x in problem.inputs.split(batch):
        block(problem.config, _ObservingOps(problem.config, weights, problem.records, seen=seen), x)
    kept = {role for role, record in problem.records.items() if record.spec.output == "static"}
    inputs: dict[_Observer, StaticRange] = {}
    for before, _ in seen.values():
        if before not in inputs:
            takers = [weights[f"{role}.weight"] for role, (observer, _) in seen.items() if observer is before]
            inputs[before] = before.grid_for(takers) if method == "output" else before.grid(method)
    elementwise: Method = "mse" if method == "output" else method
    return {
        role: (inputs[before], after.grid(elementwise) if role in kept else None)
        for role, (before, after) in seen.items()
    }
