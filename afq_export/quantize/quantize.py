"""The quantize stage: FoldedCheckpoint, Calibration, assigned grids -> QuantizedCheckpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.calibrate.result import BlockResult, Calibration
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.progress import Progress
from afq_export.quantize.assign import HEAD
from afq_export.quantize.checkpoint import (
    LinearRecord,
    QuantizedCheckpoint,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedPart,
    StaticRange,
    write_checkpoint,
)
from afq_export.quantize.grid import weight_codes, weight_scales
from afq_export.spec.quant import Granularity, QuantSpec, linear_name
from afq_export.spec.recipe import FLOAT_CACHE, Embedding, KvCache


def quantize(
    folded: FoldedCheckpoint,
    calibration: Calibration,
    records: Mapping[str, LinearRecord],
    embedding: Embedding,
    folder: Path,
    provenance: dict[str, Any],
    progress: Progress,
    kv_cache: KvCache = FLOAT_CACHE,
) -> QuantizedCheckpoint:
    """Integers of every linear and embedding row, written to `folder`. One block in memory at a time."""
    config, tensors = folded.config, calibration.tensors()
    rows, row_floats = _quantize_rows(folded, embedding)
    head = _quantize_head(folded, calibration, records[HEAD], tensors)

    def blocks() -> Iterator[QuantizedPart]:
        for index in range(config.layers):
            progress("quantize", index, config.layers)
            yield quantize_block(folded, calibration.block(index), records, index)
        progress("quantize", config.layers, config.layers)

    return write_checkpoint(
        folder,
        config,
        blocks(),
        rows,
        QuantizedPart(head.linears, head.floats | row_floats),
        provenance,
        tensors,
        kv_cache,
    )


def _quantize_head(
    folded: FoldedCheckpoint, calibration: Calibration, record: LinearRecord, tensors: Mapping[str, StaticRange]
) -> QuantizedPart:
    """The head and the norm before it; the float weights, which are large, are not kept."""
    if tensors:
        record = msgspec.structs.replace(record, input=tensors["final_norm"], output=tensors[HEAD])
    weights = folded.head() | calibration.outer_floats()
    linear = quantize_linear(record, weights, calibration.head_clip(record.spec), HEAD)
    return QuantizedPart((linear,), {f"head.float.{n}": t for n, t in weights.items() if not n.startswith(HEAD)})


def _quantize_rows(folded: FoldedCheckpoint, embedding: Embedding) -> tuple[QuantizedEmbedding, dict[str, Tensor]]:
    """Token rows, and what else stands before the blocks."""
    weights = folded.embedding()
    rows = quantize_embedding(weights.pop("embed_tokens.weight"), embedding)
    return rows, {f"embedding.float.{name}": tensor for name, tensor in weights.items()}


def quantize_block(
    folded: FoldedCheckpoint, result: BlockResult, records: Mapping[str, LinearRecord], index: int
) -> QuantizedPart:
    """The linears and norms of one block, from its folded weights, learned clipping and static ranges."""
    return quantize_folded(folded.config, folded.block(index), result, records, index)


def quantize_folded(
    config: DecoderConfig,
    folded: Mapping[str, Tensor],
    result: BlockResult,
    records: Mapping[str, LinearRecord],
    index: int,
) -> QuantizedPart:
    """The same from the block's weights, `folded` already."""
    weights, roles = {**folded, **result.floats}, family(config).linear_shapes(config)
    linears = []
    for role in roles:
        ranges = result.ranges.get(role)
        record = records[linear_name(index, role)]
        if ranges is not None:
            record = msgspec.structs.replace(record, input=ranges[0], output=ranges[1])
        linears.append(quantize_linear(record, weights, result.clips[role], role, result.codes.get(role)))
    floats = {f"float.{key}": t for key, t in weights.items() if key.rsplit(".", 1)[0] not in roles}
    return QuantizedPart(tuple(linears), floats)


def quantize_linear(
    record: LinearRecord, weights: Mapping[str, Tensor], clip_OG: Tensor, role: str, codes_OI: Tensor | None = None
) -> QuantizedLinear:
    """Codes and scales of one linear from float32 weights [O, I] and its clipping factors [O, G].

    `codes`: what calibration rounded the weights to; None: to nearest.
    """
    weight, spec = weights[f"{role}.weight"], record.spec.weight
    scales = weight_scales(weight, clip_OG.float(), spec)
    codes = weight_codes(weight, scales, spec) if codes_OI is None else codes_OI
    return QuantizedLinear(record, codes, scales, weights.get(f"{role}.bias"))


def quantize_embedding(rows_VD: Tensor, embedding: Embedding) -> QuantizedEmbedding:
    """Token rows on the recipe's grid; one scale per row, or per group of columns."""
    if embedding.bits == 32:
        return QuantizedEmbedding(32, 0, rows_VD, None)
    granularity = Granularity.PER_GROUP if embedding.group else Granularity.PER_CHANNEL
    spec = QuantSpec(embedding.bits, granularity, group=embedding.group)
    clip = torch.ones(rows_VD.shape[0], spec.groups(rows_VD.shape[1]))
    scales = weight_scales(rows_VD, clip, spec)
    return QuantizedEmbedding(embedding.bits, embedding.group, weight_codes(rows_VD, scales, spec), scales)
