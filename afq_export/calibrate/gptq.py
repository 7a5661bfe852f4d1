"""GPTQ (arXiv 2210.17323): column by column, each rounding error made good by the columns that follow.

A linear's quantized weight Q is to give, on what the quantized block really hands it (rows q), what the float path's
linear gives on its own input (rows f; asymmetric calibration, GPTAQ, arXiv 2504.02692):

    |f W^T - q Q^T|^2 = |q (V - Q)^T|^2 + const,     V = W + W C (H + damping)^-1,     H = q^T q,     C = (f - q)^T q

so GPTQ runs on V with the Hessian H, and what 8-bit inputs and the linears before did wrong is made good as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from afq_export.arch.decoder import block
from afq_export.arch.ops import FloatOps, Ops, Weights
from afq_export.arch.static import INPUT_OF
from afq_export.calibrate.activations import Rows
from afq_export.calibrate.learn import BlockProblem
from afq_export.calibrate.ops import QuantizedPathOps, matmuls_in
from afq_export.errors import InputError
from afq_export.quantize.checkpoint import dequantize
from afq_export.quantize.grid import weight_scales
from afq_export.spec.recipe import Rounding

DAMPING = 0.01
"""Of the mean of its diagonal, added to a Hessian's diagonal (GPTQ, section 3.3)."""
CORRECTION_DAMPING = 0.1
"""The same where V is computed: more, for V is not to follow what a few samples happen to show."""
COLUMNS = 128
"""Columns whose errors are made good at once in the columns behind them (GPTQ, section 3.3: lazy batch updates)."""


@torch.no_grad()
def gptq_block(
    problem: BlockProblem, folded: Weights, clips: Mapping[str, Tensor], float_inputs: Rows | None, rounding: Rounding
) -> dict[str, Tensor]:
    """Codes int8 [O, I] by role. Linears in running order; those that share an input are rounded together, on what the
    ones before them give. `float_inputs`: of the float path, None: only rounding errors are made good.
    Raises InputError when a Hessian is not positive definite."""
    codes: dict[str, Tensor] = {}
    partial = dict(folded)
    for role, record in problem.records.items():
        if role in codes:
            continue
        hessian, cross = _moments(problem, partial, folded, role, float_inputs, rounding)
        for other in [r for r in problem.records if INPUT_OF[r] == INPUT_OF[role]]:
            weight, spec = folded[f"{other}.weight"], problem.records[other].spec.weight
            scales = weight_scales(weight, clips[other].float(), spec)
            columns = scales.repeat_interleave(spec.group, 1)[:, : weight.shape[1]] if spec.group else scales
            try:
                target = weight if cross is None else corrected(weight, hessian, cross)
                codes[other] = gptq(target, columns.expand_as(weight), hessian, spec.qmin, spec.qmax)
            except torch.linalg.LinAlgError as error:
                why = "the Hessian of its inputs is not positive definite"
                do = "take rounding.method = learned"
                raise InputError("GPTQ fails", where=record.spec.name, why=why, do=do) from error
            partial[f"{other}.weight"] = dequantize(codes[other], scales, spec.group)
    return codes


def corrected(weight_OI: Tensor, hessian_II: Tensor, cross_II: Tensor) -> Tensor:
    """V [O, I] of this module's formula, float64."""
    weight, damped = weight_OI.double(), hessian_II.clone()
    damped.diagonal()[damped.diagonal() == 0] = 1.0  # columns that are never seen
    damped.diagonal().add_(CORRECTION_DAMPING * float(damped.diagonal().mean()))
    return weight + torch.linalg.solve(damped, (weight @ cross_II).T).T


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
        errors = w.new_zeros(len(w), end - start)
        for column in range(start, end):
            codes[:, column] = (w[:, column] / scales[:, column]).round().clamp(qmin, qmax)
            error = (w[:, column] - codes[:, column] * scales[:, column]) / upper[column, column]
            w[:, column:end] -= error[:, None] * upper[column, column:end]
            errors[:, column - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    return codes[:, order.argsort()].to(torch.int8)


def _moments(
    problem: BlockProblem, partial: Weights, folded: Weights, role: str, float_inputs: Rows | None, rounding: Rounding
) -> tuple[Tensor, Tensor | None]:
    """(H, C) float64 [I, I] over all tokens, of the linear `role`; C None without `float_inputs`.

    Products of a batch are float32, their sums float64: statistics, damped by far more than their rounding.
    """
    hessian = cross = torch.zeros((), dtype=torch.float64, device=partial[f"{role}.weight"].device)
    others = problem.inputs if float_inputs is None else float_inputs
    for x, x_float in zip(problem.inputs.split(rounding.batch), others.split(rounding.batch), strict=True):
        with matmuls_in(rounding.autocast, x.device):
            q = _reached(problem, _QuantizedInput(problem, partial, role), x)
            f = q if float_inputs is None else _reached(problem, _FloatInput(problem, folded, role), x_float)
        hessian = hessian + (q.T @ q).double()
        if float_inputs is not None:
            cross = cross + ((f - q).T @ q).double()
    return hessian, None if float_inputs is None else cross


def _reached(problem: BlockProblem, ops: Ops, x: Tensor) -> Tensor:
    """The rows [T, I], float32, that `ops` stop a block at."""
    try:
        block(problem.config, ops, x)
    except _Reached as reached:
        rows = reached.args[0]
        return rows.float().reshape(-1, rows.shape[-1])
    raise AssertionError("every linear of a block runs")


class _Reached(Exception):
    """The linear that was waited for runs, and nothing behind it is needed. args: its input."""


class _QuantizedInput(QuantizedPathOps):
    """The quantized path up to the input of the linear `role`."""

    def __init__(self, problem: BlockProblem, weights: Weights, role: str) -> None:
        super().__init__(problem.config, weights, problem.records, kv_cache=problem.kv_cache)
        self.role = role

    def linear(self, role: str, x: Tensor) -> Tensor:
        if role == self.role:
            raise _Reached(self.quantized_input(role, x))
        return super().linear(role, x)


class _FloatInput(FloatOps):
    """The float block up to the input of the linear `role`."""

    def __init__(self, problem: BlockProblem, weights: Weights, role: str) -> None:
        super().__init__(problem.config, weights)
        self.role = role

    def linear(self, role: str, x: Tensor) -> Tensor:
        if role == self.role:
            raise _Reached(x)
        return super().linear(role, x)
