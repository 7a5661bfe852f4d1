"""Static activation ranges: one grid for every linear's input and output, from the calibration windows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from afq_export.arch.decoder import block
from afq_export.arch.ops import FloatOps
from afq_export.calibrate.learn import BlockProblem, Learned, quantized_block_weights
from afq_export.calibrate.ops import QuantizedPathOps, seen_range
from afq_export.quantize.activations import dequantize_static, fake_quantize_static, quantize_static, range_grid
from afq_export.quantize.checkpoint import StaticRange

SAMPLES = 1 << 16
"""Values kept per tensor and batch for the search; the extremes are exact."""

SHRINKS = tuple(1 - i / 50 for i in range(41))
"""Fractions of the full range that the search tries: 1.0 down to 0.2."""


class _Observer:
    """Extremes of a tensor over all batches, and a regular sample of it."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        self.samples: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        flat = x.reshape(-1)
        self.samples.append(flat[:: max(1, len(flat) // SAMPLES)].clone())

    def grid(self, method: Literal["minmax", "mse"]) -> StaticRange:
        """The grid over the full range, or over the part of it with the least squared error on the sample."""
        if method == "minmax":
            return range_grid(self.low, self.high)
        x = torch.cat(self.samples)
        grids = [range_grid(self.low * shrink, self.high * shrink) for shrink in SHRINKS]
        errors = [float((dequantize_static(quantize_static(x, g), g) - x).square().mean()) for g in grids]
        return grids[int(torch.tensor(errors).argmin())]


class _ObservingOps(QuantizedPathOps):
    """The quantized path, with every linear's input and output watched before they are quantized."""

    def __init__(self, *args, seen: dict[str, tuple[_Observer, _Observer]]) -> None:
        super().__init__(*args)
        self.seen = seen

    def linear(self, role: str, x: Tensor) -> Tensor:
        before, after = self.seen.setdefault(role, (_Observer(), _Observer()))
        before.see(x)
        y = FloatOps.linear(self, role, fake_quantize_static(x, seen_range(x)))
        after.see(y)
        return fake_quantize_static(y, seen_range(y))


@torch.no_grad()
def observe_ranges(
    problem: BlockProblem, learned: Learned, method: Literal["minmax", "mse"], batch: int
) -> dict[str, tuple[StaticRange, StaticRange]]:
    """(input, output) grids by role, of the folded and weight-quantized block on its own inputs."""
    weights = quantized_block_weights(problem, learned.parameters, learned.opened, learned.stability_factor)
    seen: dict[str, tuple[_Observer, _Observer]] = {}
    for x in problem.inputs.split(batch):
        block(problem.config, _ObservingOps(problem.config, weights, problem.records, seen=seen), x)
    return {role: (before.grid(method), after.grid(method)) for role, (before, after) in seen.items()}
