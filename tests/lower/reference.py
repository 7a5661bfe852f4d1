"""The whole quantized decoder in torch: exact integer kernels, float32 between them, no cache."""

from __future__ import annotations

import torch
from torch import Tensor

from afq_export.arch import decoder
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec.catalog import load_target
from afq_export.validate.rungs import IntegerOps

TARGET = load_target("android-xnnpack")
ARITHMETICS = {kernel.name: kernel.arithmetic for kernel in TARGET.kernels}


def reference_logits(checkpoint: QuantizedCheckpoint, ids_T: Tensor) -> Tensor:
    """Float32 [T, V]."""
    config = checkpoint.config
    rows = {"embed_tokens.weight": checkpoint.embedding().dequantized()} | checkpoint.embedding_floats()
    x = decoder.embed(config, rows, ids_T[None])
    for index in range(config.layers):
        floats = checkpoint.block_floats(index)
        x = decoder.block(config, IntegerOps(config, checkpoint.block(index), floats, ARITHMETICS), x)
    head = {"lm_head": checkpoint.linear("lm_head")}
    return decoder.head(IntegerOps(config, head, checkpoint.head_floats(), ARITHMETICS), x)[0]


def random_ids(vocab: int, count: int) -> Tensor:
    """Token ids; good for equalities, not for perplexities."""
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(0))
