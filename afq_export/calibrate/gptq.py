"""GPTQ (arXiv 2210.17323): column by column, each rounding error made good by the columns that follow.

A linear's quantized weight Q is to give, on what the quantized block really hands it (rows q), what the float path's
linear gives on its own input (rows f; asymmetric calibration, GPTAQ, arXiv 2504.02692):

    |f W^T - q Q^T|^2 = |q (V - Q)^T|^2 + const,     V = W + W C (H + damping)^-1,     H = q^T q,     C = (f - q)^T q

so GPTQ runs on V with the Hessian H, and what 8-bit inputs and the linears before did wrong is made good as well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import attended, block, family
from afq_export.arch.ops import FloatOps, Ops, Weights
from afq_export.arch.static import INPUT_OF
from afq_export.calibrate.activations import IN_MEMORY, ActivationStore, Rows
from afq_export.calibrate.learn import BlockProblem
from afq_export.calibrate.ops import QuantizedPathOps, in_parts
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
    problem: BlockProblem,
    folded: Weights,
    clips: Mapping[str, Tensor],
    float_inputs: Rows | None,
    rounding: Rounding,
    store: ActivationStore = IN_MEMORY,
) -> dict[str, Tensor]:
    """Codes int8 [O, I] by role. Linears in running order; those that share an input are rounded together, on what the
    ones before them give. `float_inputs`: of the float path, None: only rounding errors are made good.
    Raises InputError when a Hessian is not positive definite."""
    codes: dict[str, Tensor] = {}
    partial = dict(folded)
    paths = [_Path(problem.config, functools.partial(_QuantizedInput, problem, partial), problem.inputs)]
    if float_inputs is not None:
        paths.append(_Path(problem.config, functools.partial(_FloatInput, problem, folded), float_inputs))
    for role, record in problem.records.items():
        if role in codes:
            continue
        if INPUT_OF[role] == "attended":
            paths = [path.past_attention(rounding, store) for path in paths]
        hessian, cross = _moments(role, paths, rounding)
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


@dataclasses.dataclass(frozen=True)
class _Path:
    """A way through the block: from its inputs [N, T, D] and, once the linears before attention are rounded, from what
    attention gives [N, T, H, d], which the others do not change. `ops`(role) stop at that linear, `ops`("") at none."""

    config: DecoderConfig
    ops: Callable[[str], Ops]
    inputs: Rows
    attended: Rows | None = None

    def past_attention(self, rounding: Rounding, store: ActivationStore) -> _Path:
        """The same from attention on."""
        shape = torch.Size((*self.inputs.shape[:2], self.config.heads, self.config.head_dim))
        through = functools.partial(attended, self.config, self.ops(""))
        parts = in_parts(through, rounding.autocast, rounding.batch, self.inputs)
        return dataclasses.replace(self, attended=store.collect(parts, shape))

    def rows(self, role: str, rounding: Rounding) -> Iterator[Tensor]:
        """Inputs [B, T, I], float32, of the linear `role`, some windows at a time."""
        known = (self.inputs,) if self.attended is None else (self.inputs, self.attended)
        return in_parts(functools.partial(self._reached, self.ops(role)), rounding.autocast, rounding.batch, *known)

    def _reached(self, ops: Ops, x: Tensor, a: Tensor | None = None) -> Tensor:
        try:
            block(self.config, ops, x) if a is None else family(self.config).attention_out(self.config, ops, x, a)
        except _Reached as reached:
            return reached.args[0]
        raise AssertionError("every linear of a block runs")


def _moments(role: str, paths: Sequence[_Path], rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """(H, C) float64 [I, I] over all tokens, of the linear `role` on the quantized and the float path; C None without
    the float one.

    Products of a batch are float32, their sums float64: statistics, damped by far more than their rounding.
    """
    sums: list[Tensor] = []
    for parts in zip(*(path.rows(role, rounding) for path in paths), strict=True):
        q, *of_float = (rows.flatten(0, -2) for rows in parts)
        products = (q.T @ q, *((f - q).T @ q for f in of_float))
        sums = [s.add_(p) for s, p in zip(sums, products, strict=True)] if sums else [p.double() for p in products]
    hessian, *cross = sums
    return hessian, cross[0] if cross else None


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
