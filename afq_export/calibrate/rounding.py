"""Rounding as its own step, after the transforms: which of its two neighbours on the grid each weight goes to.

    nearest   the nearer one, weight by weight: nothing to do here
    gptq      one column after the other, each error made good by the columns that follow (arXiv 2210.17323)
    learned   up or down so that the block's output is right (AdaRound, arXiv 2004.10568; SignRound, arXiv 2309.05516),
              jointly with the clipping of the ranges

Codes are computed from the very weights and scales that the quantize stage has, and kept in the calibration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from afq_export.arch.decoder import block
from afq_export.arch.ops import Weights
from afq_export.calibrate.learn import BlockProblem, block_output_loss, held_loss
from afq_export.calibrate.ops import QuantizedPathOps, quantized_weights
from afq_export.errors import InputError
from afq_export.quantize.checkpoint import dequantize
from afq_export.quantize.grid import grouped, round_with_offsets, rounded_codes, weight_scales
from afq_export.spec.recipe import Rounding

Clips = Mapping[str, Tensor]
DAMPING = 0.01
"""Of the mean of its diagonal, added to a Hessian's diagonal (GPTQ, section 3.3)."""
COLUMNS = 128
"""Columns whose errors are made good at once in the columns behind them (GPTQ, section 3.3: lazy batch updates)."""
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
    seed: int,
    tick: Callable[[int, int], None],
) -> Rounded:
    """Codes of all linears of a block. `folded`: its float weights with the transforms in them, as quantize has it."""
    match rounding.method:
        case "gptq":
            rounded = Rounded(_gptq_block(problem, folded, clips, rounding), dict(clips))
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


@torch.no_grad()
def _gptq_block(problem: BlockProblem, folded: Weights, clips: Clips, rounding: Rounding) -> dict[str, Tensor]:
    """Linears in running order; those that share an input are rounded together, on what the ones before them give."""
    codes: dict[str, Tensor] = {}
    while len(codes) < len(problem.records):
        partial = rounded_weights(problem, folded, Rounded(codes, dict(clips)))
        hessians = _hessians(problem, partial, set(problem.records) - set(codes), rounding.batch)
        for role, hessian in hessians.items():
            weight, spec = folded[f"{role}.weight"], problem.records[role].spec.weight
            scales = weight_scales(weight, clips[role].float(), spec)
            columns = scales.repeat_interleave(spec.group, 1)[:, : weight.shape[1]] if spec.group else scales
            try:
                codes[role] = gptq(weight, columns.expand_as(weight), hessian, spec.qmin, spec.qmax)
            except torch.linalg.LinAlgError as error:
                name = problem.records[role].spec.name
                why = "the Hessian of its inputs is not positive definite"
                raise InputError("GPTQ fails", where=name, why=why, do="take rounding.method = learned") from error
    return codes


def gptq(weight_OI: Tensor, scales_OI: Tensor, hessian_II: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes int8 [O, I] on the grid of `scales` (one for every weight) that make `(w - q) H (w - q)^T` small.

    Columns are taken in the order of their Hessian's diagonal, largest first ("act-order"); the inverse's Cholesky
    factor gives the weights of the corrections (GPTQ, algorithm 1). Float64 throughout.
    """
    hessian = hessian_II.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(DAMPING * float(hessian.diagonal().mean()))
    order = hessian.diagonal().argsort(descending=True, stable=True)
    w, scales = weight_OI.double()[:, order], scales_OI.double()[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.zeros_like(w)
    for start in range(0, w.shape[1], COLUMNS):
        end = min(start + COLUMNS, w.shape[1])
        errors = torch.zeros(len(w), end - start, dtype=w.dtype)
        for column in range(start, end):
            codes[:, column] = (w[:, column] / scales[:, column]).round().clamp(qmin, qmax)
            error = (w[:, column] - codes[:, column] * scales[:, column]) / upper[column, column]
            w[:, column:end] -= error[:, None] * upper[column, column:end]
            errors[:, column - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    return codes[:, order.argsort()].to(torch.int8)


def _hessians(problem: BlockProblem, weights: Weights, open_roles: set[str], batch: int) -> dict[str, Tensor]:
    """`x^T x`, float64 [I, I], over all tokens for those of `open_roles` that run first and share their input."""
    found: dict[str, Tensor] = {}
    for x in problem.inputs.split(batch):
        ops = _FirstInputs(problem, weights, open_roles)
        block(problem.config, ops, x)
        rows = ops.seen.reshape(-1, ops.seen.shape[-1]).double()
        hessian = rows.T @ rows
        for role in ops.roles:
            found[role] = found[role] + hessian if role in found else hessian
    return found


class _FirstInputs(QuantizedPathOps):
    """The quantized path; keeps the quantized input of the first linear in `open_roles`, and who shares it."""

    def __init__(self, problem: BlockProblem, weights: Weights, open_roles: set[str]) -> None:
        super().__init__(problem.config, weights, problem.records)
        self.open_roles, self.roles, self.seen, self._raw = open_roles, [], torch.empty(0), None

    def linear(self, role: str, x: Tensor) -> Tensor:
        if role in self.open_roles and (self._raw is None or self._raw is x):
            self._raw, self.seen = x, self.quantized_input(role, x)
            self.roles.append(role)
        return super().linear(role, x)


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
            self.shrink[role] = nn.Parameter(torch.ones(values.shape[:2]))

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
    offsets, windows = _Offsets(problem, folded, clips), len(problem.inputs)
    best, least = Rounded({}, dict(clips)), held_loss(problem, offsets.weights(), rounding.batch)
    for step in range(rounding.steps):
        part = torch.randperm(windows, generator=generator)[: rounding.batch]
        with torch.autocast("cpu", torch.bfloat16, enabled=rounding.autocast == "bfloat16"):
            loss = block_output_loss(problem, offsets.weights(), part)
        loss.backward()
        offsets.step((1 - step / rounding.steps) * rounding.rate)
        if (step + 1) % max(1, rounding.steps // MEASUREMENTS) == 0 or step + 1 == rounding.steps:
            found = held_loss(problem, offsets.weights(), rounding.batch)
            if found < least:
                kept = {role: offsets.clip(role).detach().clone() for role in problem.records}
                best, least = Rounded(offsets.codes(), kept, found), found
            tick(step + 1, rounding.steps)
    return best
