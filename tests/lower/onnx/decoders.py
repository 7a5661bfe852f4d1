"""Small random quantized decoders for the ONNX Runtime targets: every scheme, family and head shape, no training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig, Rope
from afq_export.arch.decoder import family
from afq_export.lower.onnx.program import context_length, lower_onnx
from afq_export.lower.onnx.readback import OnnxContent
from afq_export.progress import silent
from afq_export.quantize.assign import HEAD, assign, session_options
from afq_export.quantize.checkpoint import (
    LinearRecord,
    QuantizedCheckpoint,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedPart,
    write_checkpoint,
)
from afq_export.quantize.grid import round_scales
from afq_export.runtime.onnxruntime import OnnxSession, RunOptions, open_session
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.online import MATRIX_KIND, NORM_MATRIX
from afq_export.spec.quant import QuantSpec, linear_name
from afq_export.spec.recipe import Recipe
from afq_export.spec.target import Shapes, TargetProfile
from tests.checkpoints import INPUT, OUTPUT, small_config

CONTEXT, PREFILL = 40, 8
PROVENANCE = {"model": "random", "recipe": "a test's"}


def small_target(name: str = "linux-x64-ort", **options: object) -> TargetProfile:
    """A shipped target with a short context; `options` are fields of its [onnx] table."""
    target = load_target(name)
    onnx = msgspec.structs.replace(target.onnx, **options)
    return msgspec.structs.replace(target, shapes=Shapes(context=CONTEXT, prefill=PREFILL), onnx=onnx)


def decoder_config(kind: str = "llama", *, head_dim: int = 16, kv_heads: int = 2, **changes: object) -> DecoderConfig:
    """Two blocks, width 64, 4 heads; OPT's heads are 16 wide and have no groups."""
    if kind == "opt":
        return small_config("opt", **changes)
    rope = Rope(tuple((1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)).tolist()))
    return small_config(kind, head_dim=head_dim, kv_heads=kv_heads, rope=rope, **changes)


def decoder_checkpoint(
    folder: Path, config: DecoderConfig, recipe: Recipe, target: TargetProfile, seed: int = 0
) -> QuantizedCheckpoint:
    """Random integers on the grids that `recipe` gets on `target`, as the quantize stage writes them.

    Tied models whose head has the embedding's grid have one table for both, as quantizing one matrix twice gives.
    """
    records, random = assign(config, recipe, target), torch.Generator().manual_seed(seed)
    blocks = []
    for index in range(config.layers):
        names = [linear_name(index, role) for role in family(config).linear_shapes(config)]
        floats = norms(config, [*family(config).block_names(config, index)], "float.", random)
        if NORM_MATRIX in recipe.transforms.online:
            floats |= matrices(config, random)
        blocks.append(QuantizedPart(tuple(linear_of(records[name], random) for name in names), floats))
    outer = norms(config, [*family(config).head_names(config)], "head.float.", random)
    if config.family == "opt":
        shape = (config.max_positions + config.position_offset, config.hidden)
        outer["embedding.float.embed_positions.weight"] = torch.randn(shape, generator=random)
    embedding, head = embedding_of(config, recipe, random), linear_of(records[HEAD], random)
    grid = head.spec.weight
    if config.tied and (grid.bits, grid.group) == (embedding.bits, embedding.group):
        head = dataclasses.replace(head, codes=embedding.codes.clone(), scales=embedding.scales.clone())
    outer_part = QuantizedPart((head,), outer)
    return write_checkpoint(folder, config, blocks, embedding, outer_part, {}, kv_cache=recipe.kv_cache)


def linear_of(record: LinearRecord, random: torch.Generator) -> QuantizedLinear:
    """Random codes over the whole grid, scales that give outputs of order one; static grids are the tests'."""
    spec, grid = record.spec, record.spec.weight
    static = spec.activation is not None and not spec.activation.dynamic
    record = msgspec.structs.replace(
        record, input=INPUT if static else None, output=OUTPUT if spec.output == "static" else None
    )
    codes = random_codes((spec.outputs, spec.inputs), grid, random)
    scales = 2.0 / (grid.qmax * spec.inputs**0.5) * (0.5 + torch.rand(spec.outputs, spec.groups, generator=random))
    scales = round_scales(scales, grid.scale_type)
    return QuantizedLinear(record, codes, scales, torch.randn(spec.outputs, generator=random) if spec.bias else None)


def embedding_of(config: DecoderConfig, recipe: Recipe, random: torch.Generator) -> QuantizedEmbedding:
    """Random token rows on the recipe's grid; every scale is another."""
    shape, grid = (config.vocab, config.hidden), recipe.embedding
    if grid.bits == 32:
        return QuantizedEmbedding(32, 0, torch.randn(shape, generator=random), None)
    codes = torch.randint(-(1 << grid.bits - 1), 1 << grid.bits - 1, shape, dtype=torch.int8, generator=random)
    groups = config.hidden // grid.group if grid.group else 1
    scales = (0.5 + torch.rand(config.vocab, groups, generator=random)) / (1 << grid.bits - 1)
    return QuantizedEmbedding(grid.bits, grid.group, codes, scales)


def random_codes(shape: tuple[int, int], grid: QuantSpec, random: torch.Generator) -> Tensor:
    """int8 over the whole grid."""
    return torch.randint(grid.qmin, grid.qmax + 1, shape, dtype=torch.int8, generator=random)


def norms(config: DecoderConfig, names: list[str], prefix: str, random: torch.Generator) -> dict[str, Tensor]:
    """Those of `names` that are norms': gains near one, biases near zero."""
    found = {}
    for name in (name for name in names if "norm" in name):
        width = config.head_dim if name.startswith(("q_norm", "k_norm")) else config.hidden
        found[prefix + name] = 0.1 * torch.randn(width, generator=random) + name.endswith("weight")
    return found


def matrices(config: DecoderConfig, random: torch.Generator) -> dict[str, Tensor]:
    """Those behind the norms of a block: dense, and near enough to one that outputs stay of order one."""
    size = config.hidden
    return {
        f"float.{norm}.{MATRIX_KIND}": torch.eye(size) + torch.randn(size, size, generator=random) / size
        for norm in family(config).NORMS
    }


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A decoder and its file."""

    checkpoint: QuantizedCheckpoint
    target: TargetProfile
    path: Path
    content: OnnxContent

    @property
    def config(self) -> DecoderConfig:
        return self.checkpoint.config

    @property
    def options(self) -> RunOptions:
        """How the file is run."""
        session = session_options(self.checkpoint.records, self.target)
        return RunOptions(session, self.target.onnx.providers, context_length(self.checkpoint, self.target), PREFILL)

    def session(self) -> OnnxSession:
        """The file as the package runs it."""
        return OnnxSession(self.path, self.options)

    @functools.cached_property
    def inside(self) -> ort.InferenceSession:
        """The file as ONNX Runtime shows it, opened once."""
        return open_session(self.path, self.options)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        names = [value.name for value in self.inside.get_outputs()]
        return dict(zip(names, self.inside.run(names, dict(inputs)), strict=True))


def lowered(
    folder: Path,
    config: DecoderConfig,
    scheme: str,
    target: TargetProfile | None = None,
    changes: tuple[str, ...] = (),
    seed: int = 0,
) -> Lowered:
    """A random decoder of `config` on the scheme's grids, lowered into `folder`."""
    target = target or small_target()
    checkpoint = decoder_checkpoint(folder / "quantized", config, load_recipe(scheme, changes), target, seed)
    content = lower_onnx(checkpoint, target, folder, PROVENANCE, silent)
    return Lowered(checkpoint, target, folder / "model.onnx", content)


def random_ids(vocab: int, count: int, seed: int = 0) -> Tensor:
    """Token ids int64 [count]; good for equalities, not for perplexities."""
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


BEHIND_NORMS = (f'transforms.online=["{NORM_MATRIX}"]', "transforms.norm_to_linears=affine", "learning.epochs=1")
STATIC_OUTPUT = ('activations.output="static"',)
CASES: dict[str, tuple[DecoderConfig, str, tuple[str, ...]]] = {
    "llama, heads of 8": (decoder_config(head_dim=8, kv_heads=4), "w8a8-dynamic", ()),
    "llama, grouped queries, tied": (decoder_config(kv_heads=1, tied=True), "w8a8-dynamic", ()),
    "llama, heads of 80": (decoder_config(head_dim=80, kv_heads=2, layers=1), "w4a8-g32", ()),
    "llama, weights only": (decoder_config(kv_heads=1), "w4a16-g32", ()),
    "llama, 2 bits": (decoder_config(head_dim=16, kv_heads=4, vocab=100), "w2a16-g64", ()),
    "llama, 3 bits": (decoder_config(), "w3a16-g128", ()),
    "llama, rows of 4 bits": (decoder_config(intermediate=300), "w4a16", ()),
    "llama, 4-bit inputs": (decoder_config(kv_heads=1), "w4a4", ()),
    "llama, requantized": (decoder_config(), "w8a8-static", STATIC_OUTPUT),
    "qwen2": (decoder_config("qwen2"), "w8a8-static", ()),
    "qwen2, groups": (decoder_config("qwen2", layers=1), "w4a8-g32", ()),
    "qwen3": (decoder_config("qwen3"), "w8a8-dynamic", ()),
    "mistral, all in 4 bits, tied": (decoder_config("mistral", tied=True), "w4a8-g32-all4", ()),
    "opt, tied": (decoder_config("opt", tied=True), "w8a8-dynamic", ()),
    "opt, static": (decoder_config("opt"), "w8a8-static", ()),
    "opt, gelu, groups": (decoder_config("opt", activation="gelu", layers=1), "w4a8-g32", ()),
    "opt, gelu of tanh": (decoder_config("opt", activation="gelu_tanh", layers=1), "w8a8-static", ()),
    "llama, cache of 8 bits": (decoder_config(kv_heads=1), "w8a8-dynamic", ("kv_cache.bits=8",)),
    "opt, cache of 4 bits": (decoder_config("opt", layers=1), "w4a8", ("kv_cache.bits=4", "kv_cache.group=8")),
    "opt, float rows": (decoder_config("opt", layers=1), "w4a8", ("embedding.bits=32",)),
    "llama, Hadamard matrices": (decoder_config(kv_heads=1, down_hadamard=32), "w8a8-static", ()),
    "llama, matrices behind norms": (decoder_config(kv_heads=1), "w4a4", BEHIND_NORMS),
    "opt, matrices behind norms": (decoder_config("opt", layers=1), "w8a8-static", BEHIND_NORMS),
}
"""Name -> configuration, scheme and changes of the recipe: all families, head shapes, kernels and embeddings."""


class Decoders:
    """Lowered decoders of CASES, made when first asked for, and once. They must not be changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Lowered] = {}

    def __call__(self, case: str) -> Lowered:
        if case not in self._made:
            config, scheme, changes = CASES[case]
            self._made[case] = lowered(self._folder / str(len(self._made)), config, scheme, changes=changes)
        return self._made[case]
