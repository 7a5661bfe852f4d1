"""The whole decoder as one TOSA graph, written by the families' own functions.

It takes up to T tokens that follow S others in the cache, always with these shapes (H heads, K KV heads, d head size):

    rows       i8  [1, T, D]          codes of the tokens' rows
    row_steps  i16 [1, T, G]          their scales, of which the largest in the table is 32767
    cos, sin   i16 [1, T, 1, d]       of their positions; the first half of sin with its sign turned
    mask       i8  [1, T, S + T]      0 where a token sees another, -1 elsewhere
    past.<i>.key  i8 [K, d, S],  past.<i>.value  i8 [K, S, d]        the cache of block i
    logits     i16 [1, T, V],    new.<i>.key  i8 [K, d, T],  new.<i>.value  i8 [K, T, d]

The host looks rows, cosines and sines up and writes what is new into its cache: a cache inside of the graph does not
delegate to Ethos-U (ExecuTorch 1.5 leaves `index_put` outside).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family, head
from afq_export.arch.ops import activate
from afq_export.errors import InputError
from afq_export.lower.tosa import parts
from afq_export.lower.tosa.graph import TosaGraph, Value
from afq_export.lower.tosa.operand import HALF, Operand, stored
from afq_export.lower.tosa.scale import multiplier_shift
from afq_export.progress import Progress, silent
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear, StaticRange

Grids = Mapping[str, StaticRange]
"""Name of a tensor (arch/static.py) -> its grid, of one block."""

COS_STEPS = 1 << 14
"""Steps of cos and sin to 1: two products of 16 bits stay below 2^30 each."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a program is chosen: `tokens` a call takes, and `past` tokens that the cache holds."""

    tokens: int
    past: int


def write_decoder(checkpoint: QuantizedCheckpoint, shape: Shape, progress: Progress = silent) -> TosaGraph:
    """The graph for the checkpoint. Reads it one block at a time."""
    config, arch = checkpoint.config, family(checkpoint.config)
    graph = TosaGraph("embedding")
    rope = _rope_inputs(graph, config, shape.tokens)
    mask = parts.hidden(graph, graph.input("mask", "i8", (1, shape.tokens, shape.past + shape.tokens)))
    x = arch.embed(config, write_rows(graph, checkpoint, shape.tokens), {}, None)
    for index in range(config.layers):
        progress("lower", index, config.layers + 2)
        graph.scope = f"blocks.{index}"
        grids = checkpoint.block_tensors(index)
        ops = TosaOps(config, checkpoint.block(index), checkpoint.block_floats(index), grids)
        q, k, v = arch.attention_in(config, ops, x, rope)
        with graph.part("attention"):
            attended = write_attention(graph, index, q, k, v, mask, shape, grids)
        x = arch.attention_out(config, ops, x, attended)
    graph.scope = ""
    linears = {"lm_head": checkpoint.linear("lm_head")}
    logits = head(TosaOps(config, linears, checkpoint.head_floats(), checkpoint.outer_tensors()), x)
    graph.output(logits.value, "logits")
    return graph


def write_rows(graph: TosaGraph, checkpoint: QuantizedCheckpoint, tokens: int) -> Operand:
    """Hidden states [1, T, D] in 16 bits, from codes and scales of the tokens' rows."""
    embedding = checkpoint.embedding()
    width, groups = embedding.codes.shape[1], embedding.scales.shape[1]
    rows = Operand(graph, graph.input("rows", "i8", (1, tokens, width)), 1.0)
    steps = graph.input("row_steps", "i16", (1, tokens, groups))
    if groups > 1:
        rows = rows.view(tokens, groups, width // groups)
        steps = graph.reshape(steps, (tokens, groups, 1))
    largest = float(embedding.scales.max()) / HALF
    product = Operand(graph, graph.multiply(rows.to("i16", 1.0).value, steps), largest)
    return product.view(1, tokens, width).on(checkpoint.outer_tensors()["hidden"])


def write_attention(
    graph: TosaGraph, index: int, q: Operand, k: Operand, v: Operand, mask: Value, shape: Shape, grids: Grids
) -> Operand:
    """Attention of q [1, T, H, d] over the cache and k, v [1, T, K, d], which become outputs: i8 [1, T, H, d]."""
    (_, tokens, heads, width), kv_heads = q.shape, k.shape[2]
    caches = []
    for name, new, order, past, axis in (
        ("key", k, (1, 2, 0), (kv_heads, width, shape.past), 2),
        ("value", v, (1, 0, 2), (kv_heads, shape.past, width), 1),
    ):
        new = new.view(tokens, kv_heads, width).permute(*order)
        given = graph.input(f"past.{index}.{name}", "i8", past)
        graph.output(new.value, f"new.{index}.{name}")
        caches.append(dataclasses.replace(new, value=graph.concat([given, new.value], axis)))
    queries = q.view(tokens, heads, width).permute(1, 0, 2)
    attended = parts.attention(queries, *caches, mask, grids["masked"], grids["attended"])
    return attended.permute(1, 0, 2).view(1, tokens, heads, width)


def _rope_inputs(graph: TosaGraph, config: DecoderConfig, tokens: int) -> tuple[Operand, Operand] | None:
    if config.rope is None:
        return None
    step = config.rope.attention_factor / COS_STEPS
    cos, sin = (
        Operand(graph, graph.input(name, "i16", (1, tokens, 1, config.head_dim)), step) for name in ("cos", "sin")
    )
    return cos, sin


class TosaOps:
    """`arch.ops.Ops` whose operations append operators. `rope` are cos and sin as operands."""

    def __init__(
        self,
        config: DecoderConfig,
        linears: Mapping[str, QuantizedLinear],
        floats: Mapping[str, Tensor],
        grids: Grids,
    ) -> None:
        self.config, self.linears, self.floats, self.grids = config, linears, floats, grids
        self._rotated = 0

    def linear(self, role: str, x: Operand) -> Operand:
        with x.graph.part(role):
            return write_linear(self.linears[role], x, self.grids[role])

    def norm(self, role: str, x: Operand) -> Operand:
        if self.config.family == "opt":
            raise InputError(
                "LayerNorm has no integer form here yet", where=role, do="take a model of the Llama family"
            )
        weight, bias = (self.floats.get(f"{role}.{kind}") for kind in ("weight", "bias"))
        floats = [None if tensor is None else tensor.float().numpy() for tensor in (weight, bias)]
        with x.graph.part(role):
            return parts.norm(x, floats[0], floats[1], self.config.norm_eps, self.grids[role])

    def rotate(self, x: Operand, rope: tuple[Operand, Operand]) -> Operand:
        """Queries and keys take turns, as the families call it."""
        name = f"{'qk'[self._rotated % 2]}_rotated"
        self._rotated += 1
        with x.graph.part(name):
            return parts.rotate(x, *rope, self.grids[name])

    def activation(self, x: Operand) -> Operand:
        with x.graph.part("activation"):
            return parts.activation(x, lambda at: activate(self.config.activation, torch.from_numpy(at)).numpy())

    def add(self, name: str, x: Operand, y: Operand) -> Operand:
        with x.graph.part(name):
            return parts.add(x, y, self.grids[name])

    def multiply(self, name: str, x: Operand, y: Operand) -> Operand:
        with x.graph.part(name):
            return parts.multiply(x, y, self.grids[name])


def write_linear(linear: QuantizedLinear, x: Operand, grid: StaticRange) -> Operand:
    """A linear on 8-bit `x` [1, T, I]: int32 sums with the bias in units of a product, rescaled per row to `grid`."""
    *front, inputs = x.shape
    graph = x.graph
    codes, scales = linear.codes.numpy(), linear.scales[:, 0].double().numpy()
    rows = graph.reshape(x.value, (x.value.elements // inputs, inputs))
    sums = graph.conv2d(rows, codes, bias_codes(linear, x.scale), x.zero)
    step, type, zero = stored(grid)
    value = graph.rescale(sums, type, *multiplier_shift(x.scale * scales / step), 0, zero)
    return Operand(graph, graph.reshape(value, (*front, len(codes))), step, zero)


def bias_codes(linear: QuantizedLinear, input_scale: float) -> np.ndarray:
    """int32 [O]: the bias in units of one product, rounded to even at ties. Zeros where there is none."""
    if linear.bias is None:
        return np.zeros(len(linear.codes), np.int64)
    return np.rint(linear.bias.double().numpy() / (linear.scales[:, 0].double().numpy() * input_scale))
