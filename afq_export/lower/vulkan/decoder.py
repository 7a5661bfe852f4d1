"""The decoder as a module for torch.export: integers of the checkpoint in its linears, caches as its state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8TensorActivationQuantization as ActivationQuantization,
)

from afq_export.arch.attention import apply_rope, rope_tables
from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family, head
from afq_export.arch.ops import FloatOps, PlainSums, activate
from afq_export.lower.executorch.decoder import CachedAttention, TokenRows
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear


class TracedOps(PlainSums, nn.Module):
    """`arch.ops.Ops` on plain tensors, whose linears hold the checkpoint's codes and scales."""

    def __init__(
        self, config: DecoderConfig, linears: Mapping[str, QuantizedLinear], floats: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.config, self.floats = config, {name: name.replace(".", "_") for name in floats}
        self.weights = nn.ParameterDict({role: _frozen(quantized_weight(one)) for role, one in linears.items()})
        biases = {role: one.bias for role, one in linears.items() if one.bias is not None}
        self.biases = nn.ParameterDict({role: _frozen(bias.float()) for role, bias in biases.items()})
        for name, place in self.floats.items():
            self.register_buffer(place, floats[name].float())

    def linear(self, role: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[role], self.biases.get(role))

    def norm(self, role: str, x: Tensor) -> Tensor:
        named = {name: getattr(self, place) for name, place in self.floats.items() if name.startswith(f"{role}.")}
        return FloatOps(self.config, named).norm(role, x)

    def rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return apply_rope(x, *rope)

    def activation(self, x: Tensor) -> Tensor:
        return activate(self.config.activation, x)


class TracedDecoder(nn.Module):
    """`forward(tokens int64 [1, T], input_pos int64 [1])` to logits float32 [1, T, V]; caches as in `CachedDecoder`."""

    def __init__(self, checkpoint: QuantizedCheckpoint, context: int) -> None:
        super().__init__()
        config = self.config = checkpoint.config
        self.context = context
        self.rows = TokenRows(checkpoint.embedding())
        positions = checkpoint.embedding_floats().get("embed_positions.weight")
        self.register_buffer("positions", None if positions is None else positions.float())
        if config.rope:
            cos_Sd, sin_Sd = rope_tables(config.rope, torch.arange(context))
            self.register_buffer("cos", cos_Sd)
            self.register_buffer("sin", sin_Sd)
        blocks = range(config.layers)
        self.blocks = nn.ModuleList(TracedOps(config, checkpoint.block(i), checkpoint.block_floats(i)) for i in blocks)
        self.attention = nn.ModuleList(CachedAttention(config.kv_heads, config.head_dim, context) for _ in blocks)
        self.head = TracedOps(config, {"lm_head": checkpoint.linear("lm_head")}, checkpoint.head_floats())

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        config, arch, count = self.config, family(self.config), tokens.shape[1]
        start = input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start < self.context)
        torch._check(start + count <= self.context)
        rope = None
        if config.rope:
            rope = tuple(table.narrow(0, start, count) for table in (self.cos, self.sin))
        weights = {} if self.positions is None else {"embed_positions.weight": self.positions}
        x = arch.embed(config, self.rows(tokens), weights, input_pos + torch.arange(count))
        for ops, attention in zip(self.blocks, self.attention, strict=True):
            q, k, v = arch.attention_in(config, ops, x, rope)
            x = arch.attention_out(config, ops, x, attention(q, k, v, start))
        return head(self.head, x)


def quantized_weight(linear: QuantizedLinear) -> IntxUnpackedToInt8Tensor:
    """The linear's codes and scales as torchao's tensor, which quantizes nothing by itself; int8 input where asked."""
    spec, scales = linear.spec, linear.scales.float()
    block = (1, spec.weight.group or spec.inputs)
    dynamic = ActivationQuantization.INT8_ASYM_PER_TOKEN if spec.activation is not None else None
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    return IntxUnpackedToInt8Tensor(linear.codes, scales, zeros, torch.int4, block, torch.float32, dynamic)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
