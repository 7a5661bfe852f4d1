"""Small random quantized decoders, written to disk as the `quantize` stage writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig, Rope
from afq_export.arch.decoder import family
from afq_export.quantize.checkpoint import (
    LinearRecord,
    QuantizedCheckpoint,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedPart,
    StaticRange,
    write_checkpoint,
)
from afq_export.spec.quant import Granularity, LinearSpec, QuantSpec, ScaleType, linear_name

DYNAMIC = QuantSpec(8, Granularity.PER_TOKEN, symmetric=False, dynamic=True)
STATIC = QuantSpec(8, Granularity.PER_TENSOR, symmetric=False)
KERNELS = ("qd8-f32-qc8w", "qd8-f32-qc4w", "qd8-f32-qb4w", "qs8-qc8w")
GROUP = 32


def llama(**changes: object) -> DecoderConfig:
    """A Llama of 2 blocks, hidden 64, 4 query heads on 2 KV heads."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    config = DecoderConfig(
        family="llama",
        model_type="llama",
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=96,
        vocab=80,
        max_positions=48,
        norm_eps=1e-5,
        activation="silu",
        tied=False,
        rope=Rope(tuple(frequencies.tolist())),
        bos_id=1,
        eos_ids=(2,),
    )
    return dataclasses.replace(config, **changes)


def opt(**changes: object) -> DecoderConfig:
    """An OPT of 2 blocks: LayerNorm, ReLU, learned positions, biases."""
    shape = llama(family="opt", model_type="opt", kv_heads=4, activation="relu", rope=None, position_offset=2)
    return dataclasses.replace(shape, qkv_bias=True, out_bias=True, mlp_bias=True, **changes)


def random_linear(
    name: str, outputs: int, inputs: int, kernel: str, *, bias: bool = False, seed: int = 0
) -> QuantizedLinear:
    """Round-to-nearest of a normal matrix on the grid of `kernel`."""
    random = torch.Generator().manual_seed(seed)
    bits, group = (8 if kernel.endswith("8w") else 4), (GROUP if kernel.endswith("qb4w") else 0)
    qmax = 2 ** (bits - 1) - 1
    weight = torch.randn(outputs, inputs, generator=random) / inputs**0.5
    scales = weight.view(outputs, -1, group or inputs).abs().amax(-1) / qmax
    scales = scales.bfloat16().float() if group else scales
    codes = (weight.view(outputs, -1, group or inputs) / scales[..., None]).round().clamp(-qmax - 1, qmax)
    granularity = Granularity.PER_GROUP if group else Granularity.PER_CHANNEL
    scale_type = ScaleType.BFLOAT16 if group else ScaleType.FLOAT32
    static = kernel == "qs8-qc8w"
    spec = LinearSpec(
        name,
        outputs,
        inputs,
        bias,
        QuantSpec(bits, granularity, True, group, scale_type=scale_type),
        STATIC if static else DYNAMIC,
    )
    ranges = (StaticRange(0.031234567, 5), StaticRange(0.02987654, -7)) if static else (None, None)
    return QuantizedLinear(
        LinearRecord(spec, kernel, *ranges),
        codes.to(torch.int8).view(outputs, inputs),
        scales,
        torch.randn(outputs, generator=random) * 0.1 if bias else None,
    )


def random_checkpoint(
    folder: Path,
    config: DecoderConfig,
    kernel: str | Callable[[str], str],
    *,
    head: str = "qd8-f32-qc8w",
    embedding_bits: int = 8,
) -> QuantizedCheckpoint:
    """A checkpoint whose block linears have `kernel` (or what `kernel(name)` says)."""
    choose = kernel if callable(kernel) else lambda name: kernel
    random, arch = torch.Generator().manual_seed(7), family(config)

    def norms(names: list[str], prefix: str, width: int) -> dict[str, Tensor]:
        noise = {name: torch.randn(width, generator=random) * 0.1 for name in names if "norm" in name}
        return {f"{prefix}{name}": tensor + name.endswith("weight") for name, tensor in noise.items()}

    def block(index: int) -> QuantizedPart:
        linears = []
        for place, (role, (outputs, inputs, bias)) in enumerate(arch.linear_shapes(config).items()):
            name = linear_name(index, role)
            seed = 100 * index + place
            linears.append(random_linear(name, outputs, inputs, choose(name), bias=bias, seed=seed))
        names = list(arch.block_names(config, index))
        head_norms = [name for name in names if name.startswith(("q_norm", "k_norm"))]
        wide = norms([name for name in names if name not in head_norms], "float.", config.hidden)
        return QuantizedPart(tuple(linears), wide | norms(head_norms, "float.", config.head_dim))

    rows = torch.randn(config.vocab, config.hidden, generator=random)
    if embedding_bits == 32:
        embedding = QuantizedEmbedding(32, 0, rows, None)
    else:
        qmax = 2 ** (embedding_bits - 1) - 1
        scales = rows.abs().amax(1, keepdim=True) / qmax
        embedding = QuantizedEmbedding(embedding_bits, 0, (rows / scales).round().to(torch.int8), scales)
    floats = norms(list(arch.head_names(config)), "head.float.", config.hidden)
    if config.family == "opt":
        shape = (config.max_positions + config.position_offset, config.hidden)
        floats["embedding.float.embed_positions.weight"] = torch.randn(shape, generator=random) * 0.1
    outer = QuantizedPart((random_linear("lm_head", config.vocab, config.hidden, head, seed=999),), floats)
    return write_checkpoint(folder, config, map(block, range(config.layers)), embedding, outer, {})
