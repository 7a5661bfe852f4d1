"""What is seen of one tensor in calibration, and the grids that this makes for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from afq_export.quantize.activations import dequantize_static, quantize_static, range_grid
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


class Observer:
    """Extremes of a tensor over all batches, and a regular sample of it; its grids have `bits` bits."""

    def __init__(self, bits: int = 8) -> None:
        self.bits, self.low, self.high = bits, 0.0, 0.0
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
            return range_grid(self.low, self.high, self.bits)
        x = torch.cat(self.samples)
        if method == "percentile":
            ordered, left_out = x.sort().values, int(len(x) * OUTSIDE)
            return range_grid(float(ordered[left_out]), float(ordered[-1 - left_out]), self.bits)
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
        grids = [range_grid(max(self.low, -end), min(self.high, end), self.bits) for end in ends]
        return grids[int(torch.tensor([error(grid) for grid in grids]).argmin())]
