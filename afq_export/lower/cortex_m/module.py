"""The decoder in torch with ExecuTorch's cortex_m operators; the KV cache is passed in and out.

Run as it is, the operators compute by ExecuTorch's own reference implementation of CMSIS-NN's kernels.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afq_export.arch import decoder
from afq_export.arch.attention import rope_tables
from afq_export.arch.config import DecoderConfig
from afq_export.arch.ops import FloatOps
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.runtime.library import quiet
from afq_export.validate.integer.cmsis_nn import bias_steps, requantization

REGISTERING = ("executorch.backends.cortex_m.passes", "torch.ao.quantization.fx._decomposed")
"""Importing these registers the operators; cortex_m's own module fails unless its passes are imported first."""

with quiet():
    for name in REGISTERING:
        importlib.import_module(name)

CODES = (-128, 127, torch.int8)


class StaticLinear(nn.Module):
    """A linear [O, I] with stored grids as an int8 convolution of width 1: float32 [1, T, I] to [1, T, O]."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        record = linear.record
        self.source, self.target = record.input, record.output
        multipliers, shifts = requantization(linear)
        self.register_buffer("codes", linear.codes[:, None, None, :].contiguous())
        self.register_buffer("multipliers", multipliers)
        self.register_buffer("shifts", shifts)
        self.register_buffer("bias", bias_steps(linear))
        self.register_buffer("scratch", torch.zeros(0, dtype=torch.uint8))

    def forward(self, x_1TI: Tensor) -> Tensor:
        source, target, ops = self.source, self.target, torch.ops.cortex_m
        codes = ops.quantize_per_tensor(x_1TI, source.scale, source.zero_point, *CODES)
        image = codes.permute(0, 2, 1).unsqueeze(2)
        window = ([1, 1], [0, 0], [1, 1])
        offsets = (-source.zero_point, target.zero_point)
        grids = (*offsets, self.multipliers, self.shifts, -128, 127, self.scratch)
        y = ops.quantized_conv2d(image, self.codes, self.bias, *window, *grids)
        y = y.squeeze(2).permute(0, 2, 1).contiguous()
        return ops.dequantize_per_tensor(y, target.scale, target.zero_point, *CODES)


class RowLinear(nn.Module):
    """A linear whose int8 rows are widened to float32 for each call."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.register_buffer("codes", linear.codes)
        self.register_buffer("scales", linear.scales[:, 0].contiguous())
        self.register_buffer("zero_points", torch.zeros(len(linear.codes), dtype=torch.int64))

    def forward(self, x_1TI: Tensor) -> Tensor:
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel
        return F.linear(x_1TI, dequantize(self.codes, self.scales, self.zero_points, 0, *CODES))


def linear_module(linear: QuantizedLinear) -> nn.Module:
    """The module of a linear, by whether its activations have a stored grid."""
    return StaticLinear(linear) if linear.record.input is not None else RowLinear(linear)


class _Ops(FloatOps):
    """Linears of this file, everything else in float32."""

    def __init__(self, config: DecoderConfig, linears: Mapping[str, nn.Module], floats: Mapping[str, Tensor]) -> None:
        super().__init__(config, floats)
        self.linears = linears

    def linear(self, role: str, x: Tensor) -> Tensor:
        return self.linears[role](x)


class CortexMDecoder(nn.Module):
    """forward(ids [1, T], position [1], key and value [1, S, K, d] of each block) -> logits [1, T, V], keys, values.

    `position` tokens precede the call; what a cache holds behind them counts for nothing. The caller keeps the caches,
    and writes the new keys and values [1, T, K, d].
    """

    def __init__(self, checkpoint: QuantizedCheckpoint, tokens: int, context: int) -> None:
        super().__init__()
        config = self.config = checkpoint.config
        self.tokens, self.context = tokens, context
        rows = checkpoint.embedding()
        self.register_buffer("rows", rows.codes)
        self.register_buffer("steps", rows.scales)
        self.blocks = nn.ModuleList()
        self.floats = nn.ModuleList()
        for index in range(config.layers):
            block = checkpoint.block(index).items()
            self.blocks.append(nn.ModuleDict({role: linear_module(linear) for role, linear in block}))
            self.floats.append(_buffers(checkpoint.block_floats(index)))
        self.head = nn.ModuleDict({"lm_head": linear_module(checkpoint.linear("lm_head"))})
        self.outer = _buffers(checkpoint.head_floats() | checkpoint.embedding_floats())
        if config.rope:
            for name, table in zip(("cos", "sin"), rope_tables(config.rope, torch.arange(context)), strict=True):
                self.register_buffer(name, table)
        self.register_buffer("offsets", torch.arange(tokens))
        self.register_buffer("slots", torch.arange(context))
        self.register_buffer("later", torch.full((tokens, tokens), -1e9).triu(1))

    def forward(self, ids: Tensor, position: Tensor, *caches: Tensor) -> list[Tensor]:
        config, arch = self.config, decoder.family(self.config)
        where = torch.clamp(position + self.offsets, max=self.context - 1)
        before = (self.slots >= position).to(torch.float32) * -1e9
        mask = torch.cat((before.expand(self.tokens, -1), self.later), dim=-1)
        rope = (F.embedding(where, self.cos), F.embedding(where, self.sin)) if config.rope else None
        rows = F.embedding(ids, self.rows).to(torch.float32) * F.embedding(ids, self.steps)
        outer = _named(self.outer)
        x = arch.embed(config, rows, outer, where)
        fresh = []
        for index in range(config.layers):
            ops = _Ops(config, self.blocks[index], _named(self.floats[index]))
            q, k, v = arch.attention_in(config, ops, x, rope)
            keys, values = (torch.cat(pair, dim=1) for pair in ((caches[2 * index], k), (caches[2 * index + 1], v)))
            x = arch.attention_out(config, ops, x, attend(q, keys, values, mask))
            fresh += [k, v]
        return [decoder.head(_Ops(config, self.head, outer), x), *fresh]


def attend(q_1THd: Tensor, k_1SKd: Tensor, v_1SKd: Tensor, mask_TS: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v, [1, T, H, d]; query heads share KV heads in order."""
    _, tokens, heads, width = q_1THd.shape
    shared = heads // k_1SKd.shape[2]
    q = q_1THd.permute(0, 2, 1, 3).reshape(heads // shared, shared * tokens, width)
    k, v = (t[0].permute(1, 0, 2) for t in (k_1SKd, v_1SKd))
    scores = torch.bmm(q, k.transpose(1, 2)).view(-1, shared, tokens, k.shape[1]) * width**-0.5
    weights = (scores + mask_TS).softmax(-1).view(-1, shared * tokens, k.shape[1])
    return torch.bmm(weights, v).view(1, heads, tokens, width).permute(0, 2, 1, 3)


def _buffers(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module that holds tensors; dots of their names become underscores twice."""
    held = nn.Module()
    for name, tensor in tensors.items():
        held.register_buffer(name.replace(".", "__"), tensor.float())
    return held


def _named(held: nn.Module) -> dict[str, Tensor]:
    return {name.replace("__", "."): tensor for name, tensor in held.named_buffers()}
