"""The whole quantized decoder in torch: exact integer kernels, float32 between them, no cache."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from afq_export.arch import decoder
from afq_export.arch.config import DecoderConfig
from afq_export.arch.ops import FloatOps, Weights
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.spec.catalog import load_target
from afq_export.validate.integer.linear import integer_linear

TARGET = load_target("android-xnnpack")
ARITHMETICS = {kernel.name: kernel.arithmetic for kernel in TARGET.kernels}


class ReferenceOps(FloatOps):
    """Norms and nonlinearity of torch, linears of the integer models."""

    def __init__(self, config: DecoderConfig, linears: Mapping[str, QuantizedLinear], floats: Weights) -> None:
        super().__init__(config, floats)
        self.linears = linears

    def linear(self, role: str, x: Tensor) -> Tensor:
        linear = self.linears[role]
        return integer_linear(ARITHMETICS[linear.record.kernel], linear, x)


def reference_logits(checkpoint: QuantizedCheckpoint, ids_T: Tensor) -> Tensor:
    """Float32 [T, V]."""
    config = checkpoint.config
    rows = {"embed_tokens.weight": checkpoint.embedding().dequantized()} | checkpoint.embedding_floats()
    x = decoder.embed(config, rows, ids_T[None])
    for index in range(config.layers):
        x = decoder.block(config, ReferenceOps(config, checkpoint.block(index), checkpoint.block_floats(index)), x)
    head = {"lm_head": checkpoint.linear("lm_head")}
    return decoder.head(ReferenceOps(config, head, checkpoint.head_floats()), x)[0]


def random_ids(vocab: int, count: int) -> Tensor:
    """Token ids; good for equalities, not for perplexities."""
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(0))
