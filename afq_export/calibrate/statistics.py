"""What the linears of a block see: per-channel statistics of their inputs on the calibration windows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import block
from afq_export.arch.ops import FloatOps, Weights
from afq_export.calibrate.activations import Rows
from afq_export.calibrate.shards import ALONE, Shards

SAMPLE_ROWS = 512
"""Rows of every linear's input that searches are run on."""


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Per input channel [I]: largest |x|, mean |x|, mean x^2, least and largest x; `rows` [S, I] a sample of inputs."""

    largest: Tensor
    mean: Tensor
    energy: Tensor
    low: Tensor
    high: Tensor
    rows: Tensor


class CapturingOps(FloatOps):
    """FloatOps that keeps the input of every linear of the last call."""

    def __init__(self, config: DecoderConfig, weights: Weights) -> None:
        super().__init__(config, weights)
        self.inputs: dict[str, Tensor] = {}

    def linear(self, role: str, x: Tensor) -> Tensor:
        self.inputs[role] = x
        return super().linear(role, x)


def input_statistics(
    config: DecoderConfig, weights: Weights, x_NTD: Rows, batch: int, shards: Shards = ALONE
) -> dict[str, InputStatistics]:
    """Statistics by role, of the float block on `x_NTD` and, with several processes, on everybody's."""
    parts: dict[str, list[InputStatistics]] = {}
    rows = max(1, SAMPLE_ROWS * batch // (x_NTD.shape[0] * shards.world))
    for x in x_NTD.split(batch):
        ops = CapturingOps(config, weights)
        block(config, ops, x)
        for role, seen in ops.inputs.items():
            parts.setdefault(role, []).append(_statistics(seen.reshape(-1, seen.shape[-1]), rows))
    return {role: _merged(found, shards) for role, found in parts.items()}


def _statistics(x_TI: Tensor, rows: int) -> InputStatistics:
    low, high = x_TI.amin(0), x_TI.amax(0)
    chosen = torch.arange(min(rows, len(x_TI)), device=x_TI.device) * len(x_TI) // min(rows, len(x_TI))
    magnitude = x_TI.abs()
    return InputStatistics(
        torch.maximum(low.abs(), high.abs()), magnitude.mean(0), x_TI.square().mean(0), low, high, x_TI[chosen]
    )


def _merged(parts: list[InputStatistics], shards: Shards) -> InputStatistics:
    def stack(field: str) -> Tensor:
        return shards.gather(torch.stack([getattr(part, field) for part in parts]))

    return InputStatistics(
        largest=stack("largest").amax(0),
        mean=stack("mean").mean(0),
        energy=stack("energy").mean(0),
        low=stack("low").amin(0),
        high=stack("high").amax(0),
        rows=shards.gather(torch.cat([part.rows for part in parts])),
    )
