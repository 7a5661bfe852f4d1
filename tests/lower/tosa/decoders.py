"""Random decoders with every tensor on a static grid, as the `quantize` stage writes them for Ethos-U."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import block, embed, head
from afq_export.calibrate.tensors import TensorGrids, linear_ranges, static_ops
from afq_export.quantize.activations import range_grid
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint, StaticRange, open_checkpoint
from afq_export.quantize.tensors import TensorBits
from afq_export.spec.quant import Granularity, QuantSpec
from tests.checkpoints import DequantizedWeights, random_checkpoint, random_windows

BITS = TensorBits(8, 16)
STATIC = QuantSpec(8, Granularity.PER_TENSOR, symmetric=False)


def static_decoder(folder: Path, config: DecoderConfig, bits: int = 8, seed: int = 0) -> QuantizedCheckpoint:
    """A random checkpoint with weights of `bits` bits and grids over what 96 random tokens show."""
    kernel = "qd8-f32-qc8w" if bits == 8 else "qd8-f32-qc4w"
    found = random_checkpoint(folder, config, kernel, seed=seed)
    tensors, ranges = _observed(found)
    records = {}
    for name, record in found.records.items():
        spec = msgspec.structs.replace(record.spec, activation=STATIC, output="static")
        before, after = ranges[name]
        records[name] = LinearRecord(spec, "CONV2D", before, after)
    path = folder / "quant.json"
    content = msgspec.json.decode(path.read_bytes())
    content["linears"] = msgspec.to_builtins(tuple(records.values()))
    content["tensors"] = msgspec.to_builtins(tensors)
    path.write_bytes(msgspec.json.encode(content))
    return open_checkpoint(folder)


def _observed(found: QuantizedCheckpoint):
    """Grids of all tensors, and (input, output) of all linears, by their full names."""
    config, weights = found.config, DequantizedWeights(found)
    ids = random_windows(config, count=6, length=16, seed=1).ids_NT
    x = embed(config, weights.embedding(), ids)
    rows = weights.embedding()["embed_tokens.weight"]
    tensors: dict[str, StaticRange] = {"hidden": range_grid(float(rows.min()), float(rows.max()), 16)}
    ranges = {}
    with torch.no_grad():
        for index in range(config.layers):
            seen = TensorGrids(config, BITS, observe=True)
            x = block(config, static_ops(config, weights.block(index), seen), x)
            grids = seen.found("minmax", {})
            tensors |= {f"blocks.{index}.{name}": grid for name, grid in grids.items()}
            roles = {name.rsplit(".", 1)[1]: r for name, r in found.records.items() if r.spec.block == index}
            ranges |= {f"blocks.{index}.{role}": pair for role, pair in linear_ranges(grids, roles).items()}
        seen = TensorGrids(config, BITS, observe=True)
        head(static_ops(config, weights.head(), seen), x)
    grids = seen.found("minmax", {})
    return tensors | grids, ranges | linear_ranges(grids, {"lm_head": found.records["lm_head"]})
