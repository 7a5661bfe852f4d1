"""The whole decoder as one ONNX graph, written by the families' own functions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from afq_export.arch.attention import rope_tables
from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family, head
from afq_export.arch.ops import PlainSums
from afq_export.lower.onnx.cache import write_cached
from afq_export.lower.onnx.embedding import write_rows
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.hadamard import write_hadamard, write_product
from afq_export.lower.onnx.linears import write_linear
from afq_export.lower.onnx.operand import Operand, activate
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.spec.online import MATRIX_KIND
from afq_export.spec.target import TargetProfile

BATCH, SEQUENCE = "batch", "sequence"
MASKED = float(np.finfo(np.float32).min)
"""What is added to the score of a token that is not attended to: finite, so that no row becomes NaN."""


class OnnxOps(PlainSums):
    """`arch.ops.Ops` whose operations append nodes. `rope` and `positions` are values of the graph."""

    def __init__(
        self,
        config: DecoderConfig,
        target: TargetProfile,
        linears: Mapping[str, QuantizedLinear],
        floats: Mapping[str, Tensor],
        positions: str = "",
    ) -> None:
        self.config, self.target, self.linears, self.floats = config, target, linears, floats
        self.positions = positions

    def linear(self, role: str, x: Operand) -> Operand:
        linear = self.linears[role]
        kernel, zero_points = self.target.kernel(linear.record.kernel), self.target.onnx.explicit_zero_points
        value = write_linear(x.graph, x.as_stored(x.shape), linear, kernel, zero_points)
        return Operand.of(x.graph, value, (*x.shape[:-1], linear.spec.outputs))

    def norm(self, role: str, x: Operand) -> Operand:
        names = [f"{role}.{kind}" for kind in ("weight", "bias") if f"{role}.{kind}" in self.floats]
        y = write_norm(self.config, x, *(self._tensor(x.graph, name) for name in names))
        name = f"{role}.{MATRIX_KIND}"
        return write_product(y, self._tensor(x.graph, name)) if name in self.floats else y

    def rotate(self, x: Operand, rope: tuple[str, str]) -> Operand:
        return write_rotation(x, rope, self.positions)

    def activation(self, x: Operand) -> Operand:
        return activate(self.config.activation, x)

    def hadamard(self, x: Operand, size: int) -> Operand:
        return write_hadamard(x, size)

    def _tensor(self, graph: OnnxGraph, name: str) -> str:
        return graph.tensor(f"{graph.scope}.{name}", self.floats[name].float().numpy())


def write_norm(config: DecoderConfig, x: Operand, weight: str, bias: str = "") -> Operand:
    """RMSNorm or LayerNorm over the last dimension, as one operator."""
    value, graph, options = x.as_stored(x.shape), x.graph, dict(axis=-1, epsilon=config.norm_eps)
    if config.family == "opt":
        return Operand.of(graph, graph.node("LayerNormalization", [value, weight, bias], **options), x.shape)
    y = Operand.of(graph, graph.node("RMSNormalization", [value, weight], **options), x.shape)
    return y + Operand.of(graph, bias, x.shape[-1:]) if bias else y


def write_rotation(x: Operand, rope: tuple[str, str], positions: str) -> Operand:
    """Rotary embedding of heads [B, T, H, d], which lie side by side in the file; cos and sin [S, d / 2]."""
    batch, tokens, heads, width = x.shape
    flat = (batch, tokens, heads * width)
    value = x.graph.node("RotaryEmbedding", [x.as_stored(flat), *rope, positions], num_heads=heads)
    return Operand(x.graph, value, x.shape, flat)


def write_attention(
    q: Operand, k: Operand, v: Operand, mask: str, past: tuple[str, str], present: list[str]
) -> Operand:
    """Attention of q [B, T, H, d] over the past and k, v [B, T, K, d]; `mask` is added to the scores.

    The caches [B, K, total, d] get the names `present`.
    """
    flat = [(*x.shape[:2], x.shape[2] * x.shape[3]) for x in (q, k, v)]
    inputs = [x.as_stored(shape) for x, shape in zip((q, k, v), flat, strict=True)]
    value, *_ = q.graph.nodes_of(
        "Attention",
        [*inputs, mask, *past],
        [f"{q.graph.scope}.attention", *present],
        q_num_heads=q.shape[2],
        kv_num_heads=k.shape[2],
    )
    return Operand(q.graph, value, q.shape, flat[0])


def write_attention_over(q: Operand, keys: str, values: str, mask: str) -> Operand:
    """Attention of q [B, T, H, d] over float keys and values [B, K, total, d], those of its own tokens among them."""
    graph, flat = q.graph, (*q.shape[:2], q.shape[2], q.shape[3])
    heads = graph.node("Transpose", [q.as_stored(flat)], perm=[0, 2, 1, 3])
    value = graph.node("Attention", [heads, keys, values, mask], f"{graph.scope}.attention")
    return Operand.of(graph, graph.node("Transpose", [value], perm=[0, 2, 1, 3]), q.shape)


def write_decoder(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    context: int,
    progress: Progress,
    beside: Path | None = None,
) -> OnnxGraph:
    """The graph from `input_ids` to `logits` (interface.py), for sequences of up to `context` tokens.

    Reads the checkpoint one block at a time; with `beside`, no more than that is held (see OnnxGraph).
    """
    config, arch, cache = checkpoint.config, family(checkpoint.config), checkpoint.kv_cache
    graph = OnnxGraph("embedding", beside)
    ids = Operand.of(graph, "input_ids", (BATCH, SEQUENCE))
    mask = write_mask(graph)
    positions, rope = ("position_ids", write_tables(graph, config, context)) if config.rope else ("", None)
    rows = write_rows(graph, checkpoint, target, ids)
    tables = {
        name: Operand.of(graph, graph.tensor(name, tensor.float().numpy()), tuple(tensor.shape))
        for name, tensor in checkpoint.embedding_floats().items()
    }
    where = Operand.of(graph, positions or write_positions(graph), (BATCH, SEQUENCE))
    x = arch.embed(config, rows, tables, where)
    for index in range(config.layers):
        progress("lower", index, config.layers + 2)
        graph.scope = f"blocks.{index}"
        ops = OnnxOps(config, target, checkpoint.block(index), checkpoint.block_floats(index), positions)
        q, k, v = arch.attention_in(config, ops, x, rope)
        past = (f"past_key_values.{index}.key", f"past_key_values.{index}.value")
        present = [f"present.{index}.key", f"present.{index}.value"]
        if cache.quantized:
            rows = (write_cached(x, cache, *names) for x, *names in zip((k, v), past, present, strict=True))
            attended = write_attention_over(q, *rows, mask)
        else:
            attended = write_attention(q, k, v, mask, past, present)
        x = arch.attention_out(config, ops, x, attended)
    graph.scope = "head"
    ops = OnnxOps(config, target, {"lm_head": checkpoint.linear("lm_head")}, checkpoint.head_floats())
    graph.node("Identity", [head(ops, x).value], "logits")
    progress("lower", config.layers, config.layers + 2)
    return graph


def write_tables(graph: OnnxGraph, config: DecoderConfig, context: int) -> tuple[str, str]:
    """cos and sin [context, d / 2] of all positions."""
    cos, sin = (graph.tensor(name, table) for name, table in rotary_tables(config, context).items())
    return cos, sin


def rotary_tables(config: DecoderConfig, context: int) -> dict[str, np.ndarray]:
    """Both tables by name. The two halves of a head turn alike, so half of their columns says all."""
    tables, half = rope_tables(config.rope, torch.arange(context)), config.head_dim // 2
    return {f"rope.{name}": t[:, :half].contiguous().numpy() for name, t in zip(("cos", "sin"), tables, strict=True)}


def write_mask(graph: OnnxGraph) -> str:
    """float32 [B, 1, T, total]: 0 where a token sees another (not later, not masked out), MASKED elsewhere."""
    past, total = _lengths(graph)
    one = graph.scalar(1)
    keys = graph.node("Range", [graph.scalar(0), total, one], "mask.keys")
    queries = graph.node("Range", [past, total, one], "mask.queries")
    column = graph.node("Unsqueeze", [queries, graph.integers(1)], "mask.column")
    causal = graph.node("LessOrEqual", [keys, column], "mask.causal")
    given = graph.node("Cast", ["attention_mask"], "mask.given", to=TensorProto.BOOL)
    given = graph.node("Unsqueeze", [given, graph.integers(1, 2)], "mask.row")
    seen = graph.node("And", [causal, given], "mask.seen")
    values = [graph.constant(np.array(value, np.float32), "number") for value in (0.0, MASKED)]
    return graph.node("Where", [seen, *values], "mask")


def write_positions(graph: OnnxGraph) -> str:
    """int64 [B, T]: how many tokens that are not masked out stand before each, as Hugging Face's OPT counts them."""
    past, total = _lengths(graph)
    counted = graph.node("CumSum", ["attention_mask", graph.scalar(1)], "positions.counted")
    counted = graph.node("Mul", [counted, "attention_mask"], "positions.masked")
    counted = graph.node("Sub", [counted, graph.scalar(1)], "positions.all")
    ends = [graph.node("Unsqueeze", [end, graph.integers(0)], "positions.end") for end in (past, total)]
    return graph.node("Slice", [counted, *ends, graph.integers(1)], "positions")


def _lengths(graph: OnnxGraph) -> tuple[str, str]:
    """int64 scalars: tokens in the cache, and those plus the tokens of this call."""

    def write() -> tuple[str, str]:
        sizes = [
            graph.node("Gather", [graph.node("Shape", [name], f"{name}.shape"), graph.scalar(1)], f"{name}.length")
            for name in ("attention_mask", "input_ids")
        ]
        return graph.node("Sub", sizes, "past.length"), sizes[0]

    return graph.once(("lengths",), write)
