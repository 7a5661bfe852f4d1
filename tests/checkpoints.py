"""Small random quantized linears and decoders of every kind, for tests that need no training: no file but their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig, Rope
from afq_export.arch.decoder import family
from afq_export.load.corpus import Windows
from afq_export.quantize.checkpoint import (
    LinearRecord,
    QuantizedCheckpoint,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedPart,
    StaticRange,
    write_checkpoint,
)
from afq_export.spec.catalog import load_target
from afq_export.spec.quant import Granularity, LinearSpec, QuantSpec, ScaleType, linear_name
from afq_export.spec.recipe import FLOAT_CACHE, KvCache
from afq_export.spec.target import TargetProfile

KERNELS = ("qd8-f32-qc8w", "qd8-f32-qc4w", "qd8-f32-qb4w", "qs8-qc8w")
KINDS = ("llama", "qwen2", "qwen3", "opt")
INPUT, OUTPUT = StaticRange(scale=0.0317, zero_point=-7), StaticRange(scale=0.0529, zero_point=11)
"""The grids of static linears."""


def xnnpack_target(**changes: object) -> TargetProfile:
    """The shipped XNNPACK target, fields replaced by `changes`."""
    return msgspec.structs.replace(load_target("android-xnnpack"), **changes)


def small_config(kind: str = "llama", **changes: object) -> DecoderConfig:
    """Two blocks, width 64, 96 tokens; all but OPT have grouped queries and heads that are not hidden / heads wide."""
    config = DecoderConfig(
        family="llama",
        model_type=kind,
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        intermediate=96,
        vocab=96,
        max_positions=64,
        norm_eps=1e-5,
        activation="silu",
        tied=False,
        rope=Rope(tuple((1.0 / 10000.0 ** (torch.arange(0, 32, 2).float() / 32)).tolist())),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        bos_id=1,
        eos_ids=(2,),
    )
    if kind == "opt":
        config = dataclasses.replace(
            config,
            family="opt",
            kv_heads=4,
            head_dim=16,
            activation="relu",
            rope=None,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            position_offset=2,
        )
    return dataclasses.replace(config, **changes)


def linear_spec(kernel: str, name: str, outputs: int, inputs: int, bias: bool, group: int = 32) -> LinearSpec:
    """A spec that `kernel` runs; `group` counts for kernels that have groups."""
    per_group, static = kernel == "qd8-f32-qb4w", kernel == "qs8-qc8w"
    weight = QuantSpec(
        bits=8 if kernel.endswith("qc8w") else 4,
        granularity=Granularity.PER_GROUP if per_group else Granularity.PER_CHANNEL,
        group=group if per_group else 0,
        scale_type=ScaleType.BFLOAT16 if per_group else ScaleType.FLOAT32,
    )
    granularity = Granularity.PER_TENSOR if static else Granularity.PER_TOKEN
    activation = QuantSpec(bits=8, granularity=granularity, symmetric=False, dynamic=not static)
    return LinearSpec(name=name, outputs=outputs, inputs=inputs, bias=bias, weight=weight, activation=activation)


def random_linear(
    kernel: str,
    outputs: int = 24,
    inputs: int = 64,
    *,
    name: str = "blocks.0.q_proj",
    bias: bool = True,
    group: int = 32,
    seed: int = 0,
) -> QuantizedLinear:
    """Random codes over the whole grid, scales that give outputs of order one."""
    random = torch.Generator().manual_seed(seed)
    spec = linear_spec(kernel, name, outputs, inputs, bias, group)
    codes = torch.randint(spec.weight.qmin, spec.weight.qmax + 1, (outputs, inputs), dtype=torch.int8, generator=random)
    size = 2.0 / (spec.weight.qmax * inputs**0.5)
    scales = size * (0.5 + torch.rand(outputs, spec.groups, generator=random))
    if spec.weight.scale_type is ScaleType.BFLOAT16:
        scales = scales.bfloat16().float()
    record = LinearRecord(spec, kernel, *((INPUT, OUTPUT) if kernel == "qs8-qc8w" else ()))
    return QuantizedLinear(record, codes, scales, torch.randn(outputs, generator=random) if bias else None)


def random_checkpoint(
    folder: Path,
    config: DecoderConfig,
    kernel: str | Callable[[str], str] = "qd8-f32-qc8w",
    *,
    embedding_bits: int = 8,
    seed: int = 0,
    kv_cache: KvCache = FLOAT_CACHE,
) -> QuantizedCheckpoint:
    """A checkpoint whose block linears have `kernel` (or what `kernel(name)` says), lm_head int8 per channel; written
    to `folder` as the `quantize` stage writes it, and opened."""
    choose = kernel if callable(kernel) else lambda name: kernel
    random, arch = torch.Generator().manual_seed(seed), family(config)

    def block(index: int) -> QuantizedPart:
        linears = []
        for number, (role, (outputs, inputs, bias)) in enumerate(arch.linear_shapes(config).items()):
            name = linear_name(index, role)
            place = 1000 * seed + 10 * index + number
            linears.append(random_linear(choose(name), outputs, inputs, name=name, bias=bias, seed=place))
        return QuantizedPart(tuple(linears), _norms(config, list(arch.block_names(config, index)), "float.", random))

    blocks = [block(index) for index in range(config.layers)]
    head = random_linear("qd8-f32-qc8w", config.vocab, config.hidden, name="lm_head", bias=False, seed=seed + 99)
    outer = _norms(config, list(arch.head_names(config)), "head.float.", random)
    if config.family == "opt":
        shape = (config.max_positions + config.position_offset, config.hidden)
        outer["embedding.float.embed_positions.weight"] = torch.randn(shape, generator=random)
    embedding = _embedding(config, embedding_bits, random)
    outer_part = QuantizedPart((head,), outer)
    return write_checkpoint(folder, config, blocks, embedding, outer_part, {}, kv_cache=kv_cache)


class DequantizedWeights:
    """The DecoderWeights that a checkpoint was "quantized from": its own dequantized values."""

    def __init__(self, checkpoint: QuantizedCheckpoint) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config

    def embedding(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        rows = {"embed_tokens.weight": self.checkpoint.embedding().dequantized()}
        return _cast(rows | self.checkpoint.embedding_floats(), dtype)

    def block(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        linears = self.checkpoint.block(index)
        weights = {f"{role}.weight": linear.dequantized() for role, linear in linears.items()}
        biases = {f"{role}.bias": linear.bias for role, linear in linears.items() if linear.bias is not None}
        return _cast(weights | biases | self.checkpoint.block_floats(index), dtype)

    def head(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        weight = {"lm_head.weight": self.checkpoint.linear("lm_head").dequantized()}
        return _cast(weight | self.checkpoint.head_floats(), dtype)


def random_windows(config: DecoderConfig, count: int = 3, length: int = 16, seed: int = 0) -> Windows:
    """Random token ids; good for equalities, not for perplexities."""
    ids = torch.randint(config.vocab, (count, length), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, "random", "0" * 64, length, count, "1" * 64, stride=length)


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def _norms(config: DecoderConfig, names: list[str], prefix: str, random: torch.Generator) -> dict[str, Tensor]:
    """Those of `names` that are norms': gains near one, biases near zero."""
    found = {}
    for name in (name for name in names if "norm" in name):
        width = config.head_dim if name.startswith(("q_norm", "k_norm")) else config.hidden
        found[prefix + name] = 0.1 * torch.randn(width, generator=random) + name.endswith("weight")
    return found


def _embedding(config: DecoderConfig, bits: int, random: torch.Generator) -> QuantizedEmbedding:
    shape = (config.vocab, config.hidden)
    if bits == 32:
        return QuantizedEmbedding(32, 0, torch.randn(shape, generator=random), None)
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, shape, dtype=torch.int8, generator=random)
    return QuantizedEmbedding(bits, 0, codes, torch.full((config.vocab, 1), 1.5 / limit))


def hostile_weights(linear: QuantizedLinear) -> QuantizedLinear:
    """The first rows at the ends of the grid, power-of-two scales (ties in the output), a bias that cancels."""
    grid, codes, scales = linear.spec.weight, linear.codes.clone(), linear.scales.clone()
    codes[0], codes[1], codes[2] = grid.qmin, grid.qmax, 0
    codes[3, ::2], codes[3, 1::2] = grid.qmin, grid.qmax
    scales[:8] = 2.0 ** torch.arange(-12, -4)[:, None]
    bias = linear.bias
    if bias is not None:
        bias = bias.clone()
        bias[:8] = torch.tensor([0.0, -1e3, 1e-20, 2.0**-30, 1 + 2.0**-23, -(2.0**10), 1e6, -0.0])
    return dataclasses.replace(linear, codes=codes, scales=scales, bias=bias)
