"""The integer reference of a program on Qualcomm's HTP: what its simulator was seen to compute, tensor by tensor.

    linears             validate/integer/qnn.py
    norms               rounded down to the grid, not to nearest
    q k^T, p v          with 16 bits the same cut accumulator as the linears', keys and values as weights
    everything else     float32 between the grids, rounded to nearest

Sigmoid, softmax and sums of the HTP are off by a few steps of 16 bits; `operators` counts them in every validation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from afq_export.arch.ops import Ops, Weights
from afq_export.arch.static import StaticOps, TorchParts
from afq_export.quantize.activations import dequantize_static, quantize_static
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear, StaticRange
from afq_export.quantize.tensors import Grids, on_constant_grids, visit_grids
from afq_export.spec.target import TargetProfile
from afq_export.validate.integer.qnn import product
from afq_export.validate.rungs import IntegerOps, QuantizedRung, integer_rung


@dataclasses.dataclass(frozen=True)
class HtpRung(QuantizedRung):
    """A quantized checkpoint as the HTP runs it."""

    def _ops(self, linears: Mapping[str, QuantizedLinear], floats: Weights, grids: Grids) -> Ops:
        stored = self._cast(on_constant_grids(floats, max(grid.bits for grid in grids.values())))
        ops = HtpOps(self.make_ops(linears, stored), grids)
        return StaticOps(self.config, ops, visit_grids(grids), HtpParts(grids))


def htp_rung(checkpoint: QuantizedCheckpoint, target: TargetProfile) -> HtpRung:
    """The integer reference of `checkpoint` on `target`."""
    rung = integer_rung(checkpoint, target)
    return HtpRung(rung.checkpoint, rung.make_ops, rung.dtype, rung.parts)


class HtpOps:
    """`ops`, its norms rounded down to their grids."""

    def __init__(self, ops: IntegerOps, grids: Grids) -> None:
        self.ops, self.grids = ops, grids

    def linear(self, role: str, x: Tensor) -> Tensor:
        return self.ops.linear(role, x)

    def norm(self, role: str, x: Tensor) -> Tensor:
        return rounded_down(self.ops.norm(role, x), self.grids[role])

    def activation(self, x: Tensor) -> Tensor:
        return self.ops.activation(x)


class HtpParts(TorchParts):
    """Attention's two products, which take turns, on the codes of what they multiply."""

    def __init__(self, grids: Grids) -> None:
        self.grids, self._calls = grids, 0

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        first, second, result = (("q_scaled", "keys", "scores"), ("probabilities", "values", "attended"))[
            self._calls % 2
        ]
        self._calls += 1
        source, weight, target = (self.grids[name] for name in (first, second, result))
        codes = (quantize_static(y, weight) - weight.zero_point).double()
        sums = product(quantize_static(x, source), codes, source)
        steps = sums * (source.scale * weight.scale / target.scale)
        found = (steps.round() + target.zero_point).clamp(target.qmin, target.qmax)
        return dequantize_static(found.float(), target).to(x.dtype)


def rounded_down(x: Tensor, grid: StaticRange) -> Tensor:
    """`x` at the code below it."""
    steps = (x.double() / torch.tensor(grid.scale, dtype=torch.float32).double()).floor()
    codes = (steps + grid.zero_point).clamp(grid.qmin, grid.qmax)
    return dequantize_static(codes.float(), grid).to(x.dtype)
