"""Grids of the tensors outside of all blocks, where every tensor of a program is on one: token rows and head."""

from __future__ import annotations

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import head
from afq_export.arch.ops import Weights
from afq_export.calibrate.tensors import TensorGrids, static_ops
from afq_export.quantize.activations import range_grid
from afq_export.quantize.assign import HEAD
from afq_export.quantize.checkpoint import LinearRecord, StaticRange
from afq_export.quantize.quantize import quantize_linear
from afq_export.quantize.tensors import TensorBits
from afq_export.spec.recipe import Recipe


def rows_grid(embedding: Weights, bits: int) -> StaticRange:
    """Covers every token's row (with every position's, where positions are learned): no text goes beyond it."""
    ends = [(float(table.min()), float(table.max())) for table in embedding.values()]
    return range_grid(sum(low for low, _ in ends), sum(high for _, high in ends), bits)


@torch.no_grad()
def head_grids(
    config: DecoderConfig,
    weights: Weights,
    record: LinearRecord,
    clip_OG: Tensor,
    x_NTD: Tensor,
    recipe: Recipe,
    bits: TensorBits,
) -> dict[str, StaticRange]:
    """`final_norm` and `lm_head` on what the quantized blocks give; `weights` are the head's, folded."""
    quantized = {**weights, f"{HEAD}.weight": quantize_linear(record, weights, clip_OG, HEAD).dequantized()}
    grids = TensorGrids(config, bits, observe=True)
    for x in x_NTD.split(recipe.learning.batch):
        head(static_ops(config, quantized, grids), x)
    return grids.found(recipe.ranges.method, quantized)
