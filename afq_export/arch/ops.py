"""The operations a family's functions are written in; each rung of the ladder brings its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.arch.attention import apply_rope
from afq_export.arch.config import DecoderConfig
from afq_export.spec.online import MATRIX_KIND

Weights = Mapping[str, Tensor]
"""Tensors of one block (or of the embedding, or the head) by role: `q_proj.weight` [O, I], `attn_norm.weight` [D]."""


class Ops(Protocol):
    """What a block needs to be computed. `role` is a linear's or a norm's name within the block."""

    def linear(self, role: str, x: Tensor) -> Tensor:
        """`x [..., I]` to `[..., O]`."""

    def norm(self, role: str, x: Tensor) -> Tensor:
        """RMSNorm or LayerNorm over the last dimension, weights included, and the matrix behind it if it has one."""

    def rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary embedding of heads [B, T, H, d] by cos and sin [T, d]."""

    def activation(self, x: Tensor) -> Tensor:
        """The MLP's nonlinearity."""

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """`x + y`; `name` is the sum's within the block, for runtimes that keep it on a grid of its own."""

    def multiply(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """`x * y`, named like a sum."""

    def hadamard(self, x: Tensor, size: int) -> Tensor:
        """`x` [..., n] times Hadamard matrices of `size` on the diagonal: only where a recipe asks for it."""


class PlainSums:
    """Sums and products as they are, and nothing between linears: all that most rungs and runtimes need."""

    def add(self, name: str, x, y):
        return x + y

    def multiply(self, name: str, x, y):
        return x * y

    def hadamard(self, x, size: int):
        """Only programs of targets with `online` have it: the others were refused before any work."""
        raise NotImplementedError


class FloatOps(PlainSums):
    """Plain floating point in the dtype of the weights: the reference for every other rung."""

    def __init__(self, config: DecoderConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights

    def linear(self, role: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{role}.weight"], self.weights.get(f"{role}.bias"))

    def norm(self, role: str, x: Tensor) -> Tensor:
        y, matrix = self._normalised(role, x), self.weights.get(f"{role}.{MATRIX_KIND}")
        return y if matrix is None else y @ matrix

    def rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return apply_rope(x, *rope)

    def activation(self, x: Tensor) -> Tensor:
        return activate(self.config.activation, x)

    def hadamard(self, x: Tensor, size: int) -> Tensor:
        return block_hadamard(x, size)

    def _normalised(self, role: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{role}.weight"], self.weights.get(f"{role}.bias")
        if self.config.family == "opt":
            return F.layer_norm(x, (x.shape[-1],), weight, bias, self.config.norm_eps)
        y = self.rms_norm(x, weight)
        return y if bias is None else y + bias

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps) * weight


def spread(config: DecoderConfig, ops: Ops, x: Tensor) -> Tensor:
    """The input of the MLP's last linear, multiplied by Hadamard matrices where the decoder has them."""
    return ops.hadamard(x, config.down_hadamard) if config.down_hadamard else x


def block_hadamard(x: Tensor, size: int) -> Tensor:
    """`x` [..., n] times `hadamard_matrix(size)`, once for every `size` numbers."""
    return (x.reshape(*x.shape[:-1], -1, size) @ hadamard_matrix(size, x.dtype)).reshape(x.shape)


def hadamard_matrix(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sylvester's matrix [n, n] of a power of two over its square root: orthogonal, symmetric, its own inverse."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return (matrix / size**0.5).to(dtype)


def activate(name: str, x: Tensor) -> Tensor:
    """The nonlinearity called `name` in the configuration."""
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}[name](x)
