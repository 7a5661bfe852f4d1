"""Tiny random quantized linears and checkpoints of both families, for tests that need no training and no runtime."""

from __future__ import annotations

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
from afq_export.spec.quant import Granularity, LinearSpec, QuantSpec, ScaleType, linear_name
from afq_export.spec.strict import convert, read_toml
from afq_export.spec.target import TargetProfile

ROOT = Path(__file__).parents[2]
KERNELS = ("qd8-f32-qc8w", "qd8-f32-qc4w", "qd8-f32-qb4w", "qs8-qc8w")


def xnnpack_target(**changes: object) -> TargetProfile:
    """The shipped XNNPACK target, fields replaced by `changes`."""
    path = ROOT / "targets" / "android-xnnpack.toml"
    return msgspec.structs.replace(convert(read_toml(path), TargetProfile, str(path)), **changes)


def linear_spec(kernel: str, name: str, outputs: int, inputs: int, bias: bool, group: int = 32) -> LinearSpec:
    """A spec that `kernel` runs."""
    per_group = kernel == "qd8-f32-qb4w"
    weight = QuantSpec(
        bits=8 if kernel.endswith("qc8w") else 4,
        granularity=Granularity.PER_GROUP if per_group else Granularity.PER_CHANNEL,
        group=group if per_group else 0,
        scale_type=ScaleType.BFLOAT16 if per_group else ScaleType.FLOAT32,
    )
    static = kernel == "qs8-qc8w"
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
    static = kernel == "qs8-qc8w"
    record = LinearRecord(
        spec=spec,
        kernel=kernel,
        input=StaticRange(scale=0.0317, zero_point=-7) if static else None,
        output=StaticRange(scale=0.0529, zero_point=11) if static else None,
    )
    return QuantizedLinear(record, codes, scales, torch.randn(outputs, generator=random) if bias else None)


def tiny_config(kind: str = "llama") -> DecoderConfig:
    """Two blocks, width 64, 96 tokens; `llama` has GQA and a head size that is not hidden / heads."""
    common = {
        "hidden": 64,
        "layers": 2,
        "heads": 4,
        "intermediate": 96,
        "vocab": 96,
        "max_positions": 64,
        "norm_eps": 1e-5,
        "tied": False,
    }
    if kind == "opt":
        return DecoderConfig(
            family="opt",
            model_type="opt",
            kv_heads=4,
            head_dim=16,
            activation="relu",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            position_offset=2,
            **common,
        )
    inv_freq = tuple((1.0 / 10000.0 ** (torch.arange(0, 32, 2).float() / 32)).tolist())
    return DecoderConfig(
        family="llama",
        model_type=kind,
        kv_heads=2,
        head_dim=32,
        activation="silu",
        rope=Rope(inv_freq),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        **common,
    )


def tiny_checkpoint(
    folder: Path, kernel: str = "qd8-f32-qc8w", kind: str = "llama", embedding_bits: int = 8, seed: int = 0
) -> QuantizedCheckpoint:
    """A random checkpoint whose block linears all take `kernel` (lm_head: int8 per channel), written and opened."""
    config, random = tiny_config(kind), torch.Generator().manual_seed(seed)
    shapes = family(config).linear_shapes(config).items()
    blocks = [
        QuantizedPart(
            linears=tuple(
                random_linear(kernel, outputs, inputs, name=linear_name(index, role), bias=bias, seed=number)
                for number, (role, (outputs, inputs, bias)) in enumerate(shapes, 1000 * seed + 10 * index)
            ),
            floats=_norms(config, _block_norms(config), "float", random),
        )
        for index in range(config.layers)
    ]
    head = random_linear("qd8-f32-qc8w", config.vocab, config.hidden, name="lm_head", bias=False, seed=seed + 99)
    outer = _norms(config, {"final_norm": config.hidden}, "head.float", random)
    if config.family == "opt":
        positions = config.max_positions + config.position_offset
        outer["embedding.float.embed_positions.weight"] = torch.randn(positions, config.hidden, generator=random)
    embedding = _embedding(config, embedding_bits, random)
    return write_checkpoint(folder / "quantized", config, blocks, embedding, QuantizedPart((head,), outer), {})


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


def _block_norms(config: DecoderConfig) -> dict[str, int]:
    """Name -> width of a block's norms."""
    norms = dict.fromkeys(family(config).NORMS, config.hidden)
    return norms | (dict.fromkeys(("q_norm", "k_norm"), config.head_dim) if config.qk_norm else {})


def _norms(config: DecoderConfig, widths: dict[str, int], prefix: str, random: torch.Generator) -> dict[str, Tensor]:
    """Gains near one, and in OPT biases near zero."""
    tensors = {
        f"{prefix}.{name}.weight": 1 + 0.1 * torch.randn(size, generator=random) for name, size in widths.items()
    }
    if config.family == "opt":
        tensors |= {f"{prefix}.{name}.bias": 0.1 * torch.randn(size, generator=random) for name, size in widths.items()}
    return tensors


def _embedding(config: DecoderConfig, bits: int, random: torch.Generator) -> QuantizedEmbedding:
    shape = (config.vocab, config.hidden)
    if bits == 32:
        return QuantizedEmbedding(32, 0, torch.randn(shape, generator=random), None)
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, shape, dtype=torch.int8, generator=random)
    return QuantizedEmbedding(bits, 0, codes, torch.full((config.vocab, 1), 1.5 / limit))
