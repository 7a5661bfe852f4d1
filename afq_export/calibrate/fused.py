"""What a learning step does between its matmuls, with backward passes that go over the tokens fewer times than those
that autograd puts together. Results are those of the plain operations bit for bit, gradients to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from afq_export.arch.attention import apply_rope

DISTRIBUTIONS = 1 << 22
"""Numbers of two logits tensors that are gone through together: few enough to stay in a processor's cache."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [..., D] over its root mean square, times `weight` [D]: FloatOps' norm."""
    return _RmsNorm.apply(x, weight, eps)


def rotate(x_BTHd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """`apply_rope`, whose gradient is turned back by the same angles."""
    return _Rotate.apply(x_BTHd, cos_Td, sin_Td)


def squared_errors(y_BTD: Tensor, targets: tuple[Tensor, ...], weights_BT1: Tensor) -> Tensor:
    """Weighted mean squared error to every target, averaged: a number."""
    return _SquaredErrors.apply(y_BTD, weights_BT1, *targets)


def divergence(wanted_BTV: Tensor, found_BTV: Tensor) -> Tensor:
    """Mean over tokens of KL(wanted || found) of the distributions behind two tensors of logits, in nats: a number,
    computed in float32; gradients for `found` only."""
    return _Divergence.apply(wanted_BTV, found_BTV)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        normed = x * factor
        ctx.save_for_backward(normed, factor, weight)
        return normed * weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        normed, factor, weight = ctx.saved_tensors
        of_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        scaled = grad * weight
        along = (scaled * normed).mean(-1, keepdim=True)
        return scaled.sub_(normed * along).mul_(factor), of_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return apply_rope(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return apply_rope(grad, cos, -sin), None, None


class _SquaredErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor, *targets: Tensor) -> Tensor:
        slope, total = torch.zeros_like(y), y.new_zeros(())
        for target in targets:
            error = y - target
            weighted = error * weights
            slope.add_(weighted)
            total = total + (error.square_().mul_(weights)).mean()
        ctx.save_for_backward(slope.mul_(2 / (len(targets) * y.numel())))
        return total / len(targets)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slope,) = ctx.saved_tensors
        return slope * grad, None, *(None for _ in ctx.needs_input_grad[2:])


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wanted: Tensor, found: Tensor) -> Tensor:
        slope = torch.empty_like(found) if ctx.needs_input_grad[1] else None
        vocabulary = found.shape[-1]
        tokens = found.numel() // vocabulary
        total = torch.zeros((), device=found.device)
        rows = max(1, DISTRIBUTIONS // vocabulary)
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            p, q = (logits.view(-1, vocabulary)[part].float().log_softmax(-1) for logits in (wanted, found))
            shares = p.exp()
            total += p.sub_(q).mul_(shares).sum()
            if slope is not None:
                slope.view(-1, vocabulary)[part] = q.exp_().sub_(shares).mul_(1 / tokens)
        ctx.save_for_backward(slope)
        return total / tokens

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slope,) = ctx.saved_tensors
        return None, slope * grad
