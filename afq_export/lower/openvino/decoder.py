"""The whole decoder as one OpenVINO graph, written by the families' own functions; the KV cache is its state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino
from openvino import opset15 as ops
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family, head
from afq_export.arch.ops import PlainSums
from afq_export.lower.onnx.decoder import BATCH, SEQUENCE, rotary_tables, write_mask, write_positions
from afq_export.lower.onnx.embedding import is_shared
from afq_export.lower.onnx.operand import Operand, activate
from afq_export.lower.openvino.graph import OpenvinoGraph
from afq_export.lower.openvino.linears import write_linear, write_weight
from afq_export.progress import Progress
from afq_export.quantize.assign import HEAD
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.spec.target import TargetProfile

TOTAL = "total"
"""Tokens in the cache and in the call."""
EMBEDDING = "embed_tokens"


class OpenvinoOps(PlainSums):
    """`arch.ops.Ops` whose operations append nodes; `rope` are cos and sin [B, T, 1, d] of the call's positions."""

    def __init__(
        self,
        config: DecoderConfig,
        target: TargetProfile,
        linears: Mapping[str, QuantizedLinear],
        floats: Mapping[str, Tensor],
    ) -> None:
        self.config, self.target, self.linears, self.floats = config, target, linears, floats

    def linear(self, role: str, x: Operand) -> Operand:
        linear = self.linears[role]
        value = write_linear(x.graph, x.as_stored(x.shape), linear, self.target.kernel(linear.record.kernel))
        return Operand.of(x.graph, value, (*x.shape[:-1], linear.spec.outputs))

    def norm(self, role: str, x: Operand) -> Operand:
        names = [f"{role}.{kind}" for kind in ("weight", "bias") if f"{role}.{kind}" in self.floats]
        return write_norm(self.config, x, *(self._tensor(x.graph, name) for name in names))

    def rotate(self, x: Operand, rope: tuple[str, str]) -> Operand:
        return write_rotation(x, rope)

    def activation(self, x: Operand) -> Operand:
        return write_activation(self.config.activation, x)

    def _tensor(self, graph: OpenvinoGraph, name: str) -> str:
        return graph.tensor(f"{graph.scope}.{name}", self.floats[name].float().numpy())


def write_norm(config: DecoderConfig, x: Operand, weight: str, bias: str = "") -> Operand:
    """RMSNorm or LayerNorm over the last dimension, in the operators that the plugins fuse."""
    graph, value = x.graph, x.graph.values[x.as_stored(x.shape)]
    last, eps = ops.constant(np.array([-1], np.int64)), ops.constant(np.array(config.norm_eps, np.float32))
    if config.family == "opt":
        normed = ops.mvn(value, last, True, config.norm_eps, "inside_sqrt")
    else:
        square = ops.power(value, ops.constant(np.float32(2)))
        root = ops.sqrt(ops.add(ops.reduce_mean(square, last, True), eps))
        normed = ops.multiply(value, ops.divide(ops.constant(np.float32(1)), root))
    y = graph.add(ops.multiply(normed, graph.values[weight]), f"{graph.scope}.norm")
    y = graph.node("Add", [y, bias]) if bias else y
    return Operand.of(graph, y, x.shape)


def write_activation(name: str, x: Operand) -> Operand:
    """The nonlinearity; silu is one operator here."""
    if name != "silu":
        return activate(name, x)
    return Operand.of(
        x.graph, x.graph.add(ops.swish(x.graph.values[x.as_stored(x.shape)]), f"{x.graph.scope}.silu"), x.shape
    )


def write_rotation(x: Operand, rope: tuple[str, str]) -> Operand:
    """Rotary embedding of heads [B, T, H, d] by cos and sin [B, T, 1, d]."""
    graph, value = x.graph, x.graph.values[x.as_stored(x.shape)]
    cos, sin = (graph.values[name] for name in rope)
    first, second = ops.split(value, ops.constant(np.int64(3)), 2).outputs()
    turned = ops.concat([ops.multiply(second, ops.constant(np.float32(-1))), first], 3)
    y = ops.add(ops.multiply(value, cos), ops.multiply(turned, sin))
    return Operand.of(graph, graph.add(y, f"{graph.scope}.rotated"), x.shape)


def write_attention(q: Operand, k: Operand, v: Operand, mask: str, caches: tuple[str, str]) -> Operand:
    """Attention of q [B, T, H, d] over the past and k, v [B, T, K, d]; `mask` is added to the scores.

    The caches [B, K, total, d] are variables of these names; before the first call they are empty.
    """
    graph, (batch, tokens, heads, width), kv_heads = q.graph, q.shape, k.shape[2]
    swap = ops.constant(np.array([0, 2, 1, 3], np.int64))
    query, *fresh = (ops.transpose(graph.values[x.as_stored(x.shape)], swap) for x in (q, k, v))
    whole = [_remembered(graph, name, x, kv_heads, width) for name, x in zip(caches, fresh, strict=True)]
    if kv_heads != heads:
        whole = [_repeated(graph, x, kv_heads, heads, width) for x in whole]
    attended = ops.scaled_dot_product_attention(query, *whole, graph.values[mask], causal=False)
    y = graph.add(ops.transpose(attended, swap), f"{graph.scope}.attention")
    return Operand.of(graph, y, (batch, tokens, heads, width))


def _remembered(graph: OpenvinoGraph, name: str, fresh: openvino.Node, kv_heads: int, width: int) -> openvino.Node:
    """The cache `name`, rows in the order of `beam_idx`, with `fresh` behind it; assigned and returned."""
    info = openvino.op.util.VariableInfo()
    info.data_shape = openvino.PartialShape([-1, kv_heads, -1, width])
    info.data_type, info.variable_id = openvino.Type.f32, name
    variable = openvino.op.util.Variable(info)
    empty = graph.once(("empty", kv_heads, width), lambda: _empty(graph, kv_heads, width))
    read = ops.read_value(graph.values[empty], variable)
    kept = ops.gather(read, graph.values["beam_idx"], ops.constant(np.int64(0)))
    whole = ops.concat([kept, fresh], 2)
    graph.variables[name] = variable
    graph.sinks.append(ops.assign(whole, variable))
    return whole


def _empty(graph: OpenvinoGraph, kv_heads: int, width: int) -> str:
    """float32 [B, K, 0, d]."""
    batch = ops.gather(ops.shape_of(graph.values["input_ids"], "i64"), ops.constant(np.array([0])), ops.constant(0))
    shape = ops.concat([batch, *(ops.constant(np.array([size])) for size in (kv_heads, 0, width))], 0)
    return graph.add(ops.broadcast(ops.constant(np.float32(0)), shape), "cache.empty")


def _repeated(graph: OpenvinoGraph, x: openvino.Node, kv_heads: int, heads: int, width: int) -> openvino.Node:
    """Heads [B, K, S, d] as [B, H, S, d]: each K for the query heads that share it."""
    sizes = ops.shape_of(x, "i64")
    batch, total = (ops.gather(sizes, ops.constant(np.array([axis])), ops.constant(0)) for axis in (0, 2))
    repeats = heads // kv_heads
    parts = [batch, *(ops.constant(np.array([size])) for size in (kv_heads, repeats)), total]
    wide = ops.broadcast(
        ops.unsqueeze(x, ops.constant(np.array(2))),
        ops.concat([*parts, ops.constant(np.array([width]))], 0),
        broadcast_spec="BIDIRECTIONAL",
    )
    return ops.reshape(wide, ops.constant(np.array([0, heads, -1, width])), special_zero=True)


def write_decoder(
    checkpoint: QuantizedCheckpoint, target: TargetProfile, context: int, progress: Progress
) -> openvino.Model:
    """The model from `input_ids` to `logits`, for sequences of up to `context` tokens, in the form of optimum-intel:
    input_ids and position_ids [B, T], attention_mask [B, total], beam_idx [B]; the cache is state.

    Reads the checkpoint one block at a time.
    """
    config, arch = checkpoint.config, family(checkpoint.config)
    graph = OpenvinoGraph("embedding")
    ids = Operand.of(graph, graph.parameter("input_ids", (BATCH, SEQUENCE), np.int64), (BATCH, SEQUENCE))
    graph.parameter("attention_mask", (BATCH, TOTAL), np.int64)
    positions = graph.parameter("position_ids", (BATCH, SEQUENCE), np.int64) if config.rope else write_positions(graph)
    graph.parameter("beam_idx", (BATCH,), np.int32)
    mask = write_mask(graph)
    rope = write_rope(graph, config, context) if config.rope else None
    tables = {
        name: Operand.of(graph, graph.tensor(name, tensor.float().numpy()), tuple(tensor.shape))
        for name, tensor in checkpoint.embedding_floats().items()
    }
    where = Operand.of(graph, positions, (BATCH, SEQUENCE))
    x = arch.embed(config, write_rows(graph, checkpoint, target, ids), tables, where)
    for index in range(config.layers):
        progress("lower", index, config.layers + 2)
        graph.scope = f"blocks.{index}"
        ops_ = OpenvinoOps(config, target, checkpoint.block(index), checkpoint.block_floats(index))
        q, k, v = arch.attention_in(config, ops_, x, rope)
        caches = tuple(f"past_key_values.{index}.{kind}present.{index}.{kind}" for kind in ("key", "value"))
        x = arch.attention_out(config, ops_, x, write_attention(q, k, v, mask, caches))
    graph.scope = "head"
    ops_ = OpenvinoOps(config, target, {HEAD: checkpoint.linear(HEAD)}, checkpoint.head_floats())
    logits = head(ops_, x)
    progress("lower", config.layers, config.layers + 2)
    return graph.model({"logits": logits.value}, "decoder")


def write_rows(graph: OpenvinoGraph, checkpoint: QuantizedCheckpoint, target: TargetProfile, ids: Operand) -> Operand:
    """Rows [B, T, D] of the ids [B, T]: looked up in the compressed table, which is the head's where both are one."""
    embedding, last = checkpoint.embedding(), checkpoint.linear(HEAD)
    if embedding.scales is None:
        table = graph.tensor(f"{EMBEDDING}.weight", embedding.codes.float().numpy())
    else:
        shared = is_shared(embedding, last, target.kernel(last.record.kernel).stored_bits)
        name = HEAD if shared else EMBEDDING
        table = write_weight(graph, name, embedding.codes, embedding.scales, embedding.group, embedding.bits)
    rows = graph.node("Gather", [table, ids.value], EMBEDDING)
    return Operand.of(graph, rows, (*ids.shape, checkpoint.config.hidden))


def write_rope(graph: OpenvinoGraph, config: DecoderConfig, context: int) -> tuple[str, str]:
    """cos and sin [B, T, 1, d] of the call's positions, both halves alike."""
    found = []
    for name, table in rotary_tables(config, context).items():
        rows = graph.node("Gather", [graph.tensor(name, table), "position_ids"], f"{name}.rows")
        both = graph.node("Concat", [rows, rows], f"{name}.both", axis=-1)
        found.append(graph.node("Unsqueeze", [both, graph.integers(2)], f"{name}.heads"))
    cos, sin = found
    return cos, sin
