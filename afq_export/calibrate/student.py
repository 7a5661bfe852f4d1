"""The quantized model in the form that is learned end to end: codes, and what scales, gains and offsets do to them.

Codes move by offsets, in steps of their grid, that begin where the folded weight was: one that was nearly rounded the
other way goes there first, as in training with rounded weights. Those that rounding sent past their nearest code begin
in the middle: near its border, most of them would go back at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import block, embed, head
from afq_export.arch.ops import Weights
from afq_export.calibrate.activations import CPU
from afq_export.calibrate.ops import QuantizedPathOps, Ranges, Records, moved
from afq_export.calibrate.result import BlockResult, Calibration
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.load.checkpoint import DecoderWeights
from afq_export.quantize.assign import HEAD
from afq_export.quantize.checkpoint import LinearRecord, QuantizedLinear
from afq_export.quantize.grid import clipped_scales, group_peaks, in_steps, moved_codes, scale_codes
from afq_export.quantize.quantize import quantize_embedding, quantize_folded, quantize_linear
from afq_export.spec.quant import Granularity
from afq_export.spec.recipe import EndToEnd, Recipe

NEAREST = 0.5
"""Steps of the grid up to which a code is the nearest."""


@dataclasses.dataclass(frozen=True)
class TunedBlock:
    """A block's codes int8 [O, I] by role and what is learned: a factor [O, G] on every scale, the norms' tensors,
    offsets [O, I] of the codes (none: they stand). `peaks` [O, G]: of the folded weights, that clipping factors refer
    to."""

    config: DecoderConfig
    records: Records
    ranges: Ranges | None
    codes: Mapping[str, Tensor]
    peaks: Mapping[str, Tensor]
    clips: Mapping[str, Tensor]
    biases: Weights
    factors: Mapping[str, Tensor]
    gains: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]

    def clip(self, role: str) -> Tensor:
        """Clipping factors [O, G] as they are now."""
        return self.clips[role] * self.factors[role]

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the block, the linears' on their grids; differentiable in what is learned."""
        weights = {**self.biases, **self.gains}
        for role, record in self.records.items():
            spec = record.spec.weight
            scales = clipped_scales(self.peaks[role], self.clip(role), spec)
            weights[f"{role}.weight"] = scale_codes(self.codes[role], scales, spec, self.offsets.get(role))
        return weights

    def moved_codes(self) -> dict[str, Tensor]:
        """The codes as `weights` has them."""
        moves = {
            role: moved_codes(self.codes[role], x, self.records[role].spec.weight) for role, x in self.offsets.items()
        }
        return {**self.codes, **moves}


@dataclasses.dataclass(frozen=True)
class Student:
    """The quantized model: token rows, blocks, last norm (learned) and head."""

    config: DecoderConfig
    recipe: Recipe
    embedding: Weights
    blocks: tuple[TunedBlock, ...]
    norm: Mapping[str, Tensor]
    head: Weights
    head_record: LinearRecord

    def weights(self) -> list[dict[str, Tensor]]:
        """Of all blocks, and of the last norm."""
        return [*(part.weights() for part in self.blocks), dict(self.norm)]

    def logits(self, weights: Sequence[Weights], ids_BT: Tensor) -> Tensor:
        """[B, T, V] with `weights` as `weights()` gives them."""
        x = embed(self.config, self.embedding, ids_BT)
        *of_blocks, norm = weights
        for part, of_block in zip(self.blocks, of_blocks, strict=True):
            x = block(self.config, self._ops(of_block, part.records, part.ranges), x)
        return head(self._ops({**self.head, **norm}, {HEAD: self.head_record}, None), x)

    def learned(self, plan: EndToEnd) -> list[dict]:
        """The optimiser's groups: factors, gains and offsets, each with its rate."""
        factors = [factor for part in self.blocks for factor in part.factors.values()]
        gains = [gain for part in self.blocks for gain in part.gains.values()] + list(self.norm.values())
        offsets = [offset for part in self.blocks for offset in part.offsets.values()]
        rates = ((factors, plan.scale_rate), (gains, plan.gain_rate), (offsets, plan.code_rate))
        return [{"params": tensors, "lr": rate} for tensors, rate in rates if tensors]

    def _ops(self, weights: Weights, records: Records, ranges: Ranges | None) -> QuantizedPathOps:
        return QuantizedPathOps(self.config, weights, records, ranges, self.recipe.kv_cache)


@torch.no_grad()
def student_of(
    model: DecoderWeights,
    recipe: Recipe,
    records: Mapping[str, LinearRecord],
    calibration: Calibration,
    device: torch.device = CPU,
) -> Student:
    """The quantized model as the quantize stage would write it, in the form that is learned. Its last norm and its
    blocks' factors, gains and offsets are leaves that gradients are kept for."""
    folded = FoldedCheckpoint(model, calibration.transforms())
    blocks = tuple(
        _tuned_block(folded, calibration.block(index), records, index, recipe.end_to_end, device)
        for index in range(model.config.layers)
    )
    rows, outer = folded.embedding(), folded.head()
    shipped = quantize_embedding(rows["embed_tokens.weight"], recipe.embedding)
    embedding = moved(rows | {"embed_tokens.weight": shipped.dequantized()}, device)
    linear = quantize_linear(records[HEAD], outer, calibration.head_clip(records[HEAD].spec), HEAD)
    norm = _learned({name: tensor for name, tensor in outer.items() if not name.startswith(HEAD)}, device)
    of_head = moved({f"{HEAD}.weight": linear.dequantized()}, device)
    return Student(model.config, recipe, embedding, blocks, norm, of_head, linear.record)


def tuned_result(part: TunedBlock, result: BlockResult) -> BlockResult:
    """`result` with what `part` has learned in place of its clipping factors, codes and floats."""
    clips = {role: part.clip(role).detach().cpu() for role in part.records}
    floats = {name: tensor.detach().cpu() for name, tensor in part.gains.items()}
    return dataclasses.replace(result, clips=clips, codes=moved(part.moved_codes(), CPU), floats=floats)


def _learned(tensors: Weights, device: torch.device) -> dict[str, Tensor]:
    """Copies on `device` that gradients are kept for."""
    return {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in tensors.items()}


def _tuned_block(
    folded: FoldedCheckpoint,
    result: BlockResult,
    records: Mapping[str, LinearRecord],
    index: int,
    plan: EndToEnd,
    device: torch.device,
) -> TunedBlock:
    weights = folded.block(index)
    part = quantize_folded(folded.config, weights, result, records, index)
    linears = {linear.spec.role: linear for linear in part.linears}
    shapes = {role: linear.scales.shape for role, linear in linears.items()}
    shapes |= {r: (1, 1) for r, linear in linears.items() if linear.spec.weight.granularity is Granularity.PER_TENSOR}
    peaks = {role: group_peaks(weights[f"{role}.weight"], linear.spec.weight) for role, linear in linears.items()}
    biases = {f"{role}.bias": linear.bias for role, linear in linears.items() if linear.bias is not None}
    moving = linears.items() if plan.code_rate else ()
    offsets = {role: _offsets(weights[f"{role}.weight"], linear) for role, linear in moving}
    return TunedBlock(
        config=folded.config,
        records={role: linear.record for role, linear in linears.items()},
        ranges=result.ranges or None,
        codes=moved({role: linear.codes for role, linear in linears.items()}, device),
        peaks=moved(peaks, device),
        clips=moved({role: result.clips[role].float() for role in linears}, device),
        biases=moved(biases, device),
        factors=_learned({role: torch.ones(shape) for role, shape in shapes.items()}, device),
        gains=_learned({name.removeprefix("float."): tensor for name, tensor in part.floats.items()}, device),
        offsets=_learned(offsets, device),
    )


def _offsets(weight_OI: Tensor, linear: QuantizedLinear) -> Tensor:
    """Where the folded weight was, in steps from its code [O, I]; 0 where it was nearer to another code."""
    away = in_steps(weight_OI, linear.scales, linear.spec.weight) - linear.codes
    return away * (away.abs() < NEAREST)
