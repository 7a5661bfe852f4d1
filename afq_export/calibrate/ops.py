"""Ops of the quantized path while a block is learned, and of the block that was kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, amp

from afq_export.arch.attention import causal_attention
from afq_export.arch.config import DecoderConfig
from afq_export.arch.ops import FloatOps, Weights
from afq_export.calibrate.activations import Rows
from afq_export.calibrate.attention import attention_in_parts
from afq_export.calibrate.fused import rms_norm, rotate, squared_errors
from afq_export.quantize.activations import fake_quantize_static, quantize_dynamic, range_grid, straight_through
from afq_export.quantize.cache import cached
from afq_export.quantize.checkpoint import LinearRecord, StaticRange
from afq_export.quantize.grid import fake_quantize_weight, weight_scales
from afq_export.spec.quant import QuantSpec
from afq_export.spec.recipe import FLOAT_CACHE, Autocast, KvCache

Records = Mapping[str, LinearRecord]
Ranges = Mapping[str, tuple[StaticRange, StaticRange | None]]
"""Role -> grid of the input, and of the output where the kernel leaves it on one."""
CACHED = 1 << 17
"""Numbers of a tensor that are gone through at a time."""


class QuantizedPathOps(FloatOps):
    """FloatOps on weights that are already fake-quantized; inputs (and static outputs) are quantized here.

    Without `ranges` a static grid covers what the call itself sees, as long as transforms still move.
    Linears that share their input share its quantization, as they do in the program.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        records: Records,
        ranges: Ranges | None = None,
        kv_cache: KvCache = FLOAT_CACHE,
    ) -> None:
        super().__init__(config, weights)
        self.records, self.ranges, self.kv_cache = records, ranges, kv_cache
        self._shared: tuple[Tensor, QuantSpec, Tensor] | None = None

    def linear(self, role: str, x: Tensor) -> Tensor:
        y = super().linear(role, self.quantized_input(role, x))
        if self.records[role].spec.output != "static":
            return y
        after = self.ranges[role][1] if self.ranges else None
        return fake_quantize_static(y, after or seen_range(y, self._bits(role)))

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.config.norm_eps)

    def rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(x, *rope)

    def attend(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Attention over keys and values as the cache holds them."""
        k_BTKd, v_BTKd = cached(k_BTKd, self.kv_cache), cached(v_BTKd, self.kv_cache)
        if q_BTHd.is_cuda or not torch.is_grad_enabled():
            return causal_attention(q_BTHd, k_BTKd, v_BTKd)
        return attention_in_parts(q_BTHd, k_BTKd, v_BTKd, self._precision(q_BTHd))

    def quantized_input(self, role: str, x: Tensor) -> Tensor:
        """`x` on the grid that the linear's input has."""
        spec = self.records[role].spec.activation
        if spec is None:
            return x
        if not spec.dynamic:
            before = self.ranges[role][0] if self.ranges else None
            return fake_quantize_static(x, before or seen_range(x, spec.bits))
        if self._shared is None or self._shared[0] is not x or self._shared[1] != spec:
            kept = self._precision(x) if torch.is_grad_enabled() else x.dtype
            self._shared = (x, spec, on_own_grid(x, spec, kept))
        return self._shared[2]

    def _precision(self, x: Tensor) -> torch.dtype:
        """Of products in this context."""
        kind = x.device.type
        halves = amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if halves else x.dtype

    def _bits(self, role: str) -> int:
        """Of the grid that a static linear leaves its result on: that of its input."""
        spec = self.records[role].spec.activation
        return spec.bits if spec else 8


def on_own_grid(x: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """`x` on the dynamic grid of `spec`, computed in float32, kept in `dtype`; gradients pass.

    On a processor so few rows at a time that they stay in its cache; each row has a grid of its own.
    """

    def rounded(x: Tensor) -> Tensor:
        new = x.new_empty(x.shape, dtype=dtype)
        rows, out = x.reshape(-1, x.shape[-1]), new.view(-1, x.shape[-1])
        count = max(1, CACHED // x.shape[-1]) if x.device.type == "cpu" else max(1, len(rows))
        for part, place in zip(rows.split(count), out.split(count), strict=True):
            place.copy_(quantize_dynamic(part.float(), spec).dequantized())
        return new

    return straight_through(x, rounded)


def quantized_weights(folded: Weights, clips: Mapping[str, Tensor], records: Records) -> dict[str, Tensor]:
    """`folded` with every linear's weight fake-quantized; gradients pass."""
    new = dict(folded)
    for role, record in records.items():
        weight, spec = folded[f"{role}.weight"], record.spec.weight
        new[f"{role}.weight"] = fake_quantize_weight(weight, weight_scales(weight, clips[role], spec), spec)
    return new


def matmuls_in(precision: Autocast, device: torch.device) -> contextlib.AbstractContextManager:
    """The precision of matmuls on `device` inside of this context."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def in_parts(function: Callable[..., Tensor], precision: Autocast, size: int, *rows: Rows) -> Iterator[Tensor]:
    """`function` of `size` windows of all `rows` at a time, float32. Its matmuls are in `precision`, not those of
    whoever takes the results."""
    for parts in zip(*(each.split(size) for each in rows), strict=True):
        with matmuls_in(precision, parts[0].device):
            y = function(*parts)
        yield y.float()


def moved(weights: Weights, device: torch.device) -> dict[str, Tensor]:
    """The weights in the memory of `device`."""
    return {name: tensor.to(device) for name, tensor in weights.items()}


def block_loss(y_BTD: Tensor, targets: tuple[Tensor, ...], weights_BT1: Tensor) -> Tensor:
    """Weighted squared error to every target, averaged (AffineQuant, eq. 4; two targets: the augmented loss)."""
    return squared_errors(y_BTD.float(), targets, weights_BT1)


def token_power(y_NTD: Tensor) -> Tensor:
    """Mean square [N, T, 1] of every token's output."""
    return y_NTD.square().mean(-1, keepdim=True).clamp_min(1e-12)


def token_weights(power_NT1: Tensor, mean: Tensor, loss: Literal["balanced", "mse"]) -> Tensor:
    """Weights [N, T, 1] that make the loss relative: 0.01 is an error of a hundredth of the output's energy.

    `power_NT1`: of the tokens (`token_power`), `mean`: over all tokens that there are.

    `mse` is the paper's loss over the mean square of all outputs. A few tokens of a Llama have outputs a thousand times
    the others' (arXiv 2402.17762) and are nearly all of that mean, yet the next norm divides every token by its own
    size; `balanced` is the mean of that loss and of each token's error over its own mean square.
    """
    overall = (1 / mean).expand_as(power_NT1)
    return overall if loss == "mse" else (overall + 1 / power_NT1) / 2


def seen_range(x: Tensor, bits: int = 8) -> StaticRange:
    """The grid that covers what is seen of a tensor in this call."""
    x = x.detach()
    return range_grid(float(x.min()), float(x.max()), bits)
