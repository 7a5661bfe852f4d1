"""Rounding as its own step, after the transforms: which of its two neighbours on the grid each weight goes to.

    nearest   the nearer one, weight by weight: nothing to do here
    gptq      one column after the other, each error made good by the columns that follow (gptq.py)
    learned   up or down so that the block's output is right (AdaRound, arXiv 2004.10568; SignRound, arXiv 2309.05516),
              jointly with the clipping of the ranges

Codes are computed from the very weights and scales that the quantize stage has, and kept in the calibration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from afq_export.arch.ops import Weights
from afq_export.calibrate.activations import IN_MEMORY, ActivationStore, Rows
from afq_export.calibrate.gptq import gptq_block
from afq_export.calibrate.learn import BlockProblem, block_output_loss, held_loss
from afq_export.calibrate.ops import matmuls_in, quantized_weights
from afq_export.quantize.checkpoint import dequantize
from afq_export.quantize.grid import grouped, round_with_offsets, rounded_codes, weight_scales
from afq_export.spec.recipe import Rounding

Clips = Mapping[str, Tensor]
MEASUREMENTS = 4
"""Times that the loss is measured, on more windows than a step has, while rounding is learned."""
FREEDOM = 0.5
"""How far, in steps of the grid, learned rounding may move a weight before it is rounded."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Codes int8 [O, I] and clipping factors [O, G] by role, and the block's loss with them; no codes: to nearest."""

    codes: dict[str, Tensor]
    clips: dict[str, Tensor]
    loss: float | None = None


def round_block(
    problem: BlockProblem,
    folded: Weights,
    clips: Clips,
    rounding: Rounding,
    float_inputs: Rows,
    seed: int,
    tick: Callable[[int, int], None],
    store: ActivationStore = IN_MEMORY,
) -> Rounded:
    """Codes of all linears of a block. `folded`: its float weights with the transforms in them, as quantize has it.
    `float_inputs`: the float path's inputs of the block [N, T, D]."""
    match rounding.method:
        case "gptq":
            whole = float_inputs if rounding.asymmetric else None
            rounded = Rounded(gptq_block(problem, folded, clips, whole, rounding, store), dict(clips))
            loss = held_loss(problem, rounded_weights(problem, folded, rounded), rounding.batch)
            return dataclasses.replace(rounded, loss=loss)
        case "learned":
            return _learn(problem, folded, clips, rounding, seed, tick)
    return Rounded({}, dict(clips))


def rounded_weights(problem: BlockProblem, folded: Weights, rounded: Rounded) -> dict[str, Tensor]:
    """`folded` with every linear's weight on its grid: by the codes where there are some, else to nearest."""
    if not rounded.codes:
        return quantized_weights(folded, rounded.clips, problem.records)
    weights = dict(folded)
    for role, codes in rounded.codes.items():
        spec = problem.records[role].spec.weight
        scales = weight_scales(folded[f"{role}.weight"], rounded.clips[role].float(), spec)
        weights[f"{role}.weight"] = dequantize(codes, scales, spec.group)
    return weights


class _Offsets(nn.Module):
    """What is learned: an offset per weight, in steps, and a logit per group that shrinks the range."""

    def __init__(self, problem: BlockProblem, folded: Weights, clips: Clips) -> None:
        super().__init__()
        self.folded, self.records, self.clips = folded, problem.records, clips
        self.offsets = nn.ParameterDict()
        self.shrink = nn.ParameterDict()
        for role, record in problem.records.items():
            values = grouped(folded[f"{role}.weight"], record.spec.weight)
            self.offsets[role] = nn.Parameter(torch.zeros_like(values))
            self.shrink[role] = nn.Parameter(values.new_ones(values.shape[:2]))

    def clip(self, role: str) -> Tensor:
        """Clipping factors [O, G]: those that were there times what was learned."""
        return self.clips[role].float() * self.shrink[role]

    def weights(self) -> dict[str, Tensor]:
        """The block's weights, quantized, differentiable in the offsets and factors."""
        weights = dict(self.folded)
        for role, record in self.records.items():
            weight, spec = self.folded[f"{role}.weight"], record.spec.weight
            scales = weight_scales(weight, self.clip(role), spec)
            weights[f"{role}.weight"] = round_with_offsets(weight, scales, self.offsets[role], spec)
        return weights

    @torch.no_grad()
    def codes(self) -> dict[str, Tensor]:
        """int8 [O, I] by role: exactly what `weights` has on its grids."""
        found = {}
        for role, record in self.records.items():
            weight, spec = self.folded[f"{role}.weight"], record.spec.weight
            scales = weight_scales(weight, self.clip(role), spec)
            found[role] = rounded_codes(weight, scales, self.offsets[role], spec)
        return found

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Signed gradient descent (SignRound, section 3.1): every offset and factor moves by `rate`, within bounds."""
        for parameters, low, high in ((self.offsets, -FREEDOM, FREEDOM), (self.shrink, 0.5, 1.0)):
            for parameter in parameters.values():
                parameter.sub_(parameter.grad.sign(), alpha=rate).clamp_(low, high)
                parameter.grad = None


def _learn(
    problem: BlockProblem,
    folded: Weights,
    clips: Clips,
    rounding: Rounding,
    seed: int,
    tick: Callable[[int, int], None],
) -> Rounded:
    """SignRound on the block's output, with the same loss as the transforms; the best state seen is kept."""
    generator = torch.Generator().manual_seed(seed)
    offsets, shards = _Offsets(problem, folded, clips), problem.shards
    best, least = Rounded({}, dict(clips)), held_loss(problem, offsets.weights(), rounding.batch)

    def run(part: Tensor) -> float:
        with matmuls_in(rounding.autocast, problem.token_weights.device):
            loss = block_output_loss(problem, offsets.weights(), part)
        loss.backward()
        return float(loss.detach())

    for step in range(rounding.steps):
        shards.step(list(offsets.parameters()), problem.batches(rounding.batch, generator)[0], run)
        offsets.step((1 - step / rounding.steps) * rounding.rate)
        if (step + 1) % max(1, rounding.steps // MEASUREMENTS) == 0 or step + 1 == rounding.steps:
            found = held_loss(problem, offsets.weights(), rounding.batch)
            if found < least:
                kept = {role: offsets.clip(role).detach().clone() for role in problem.records}
                best, least = Rounded(offsets.codes(), kept, found), found
            tick(step + 1, rounding.steps)
    return best
