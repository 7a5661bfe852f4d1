"""The decoder as two static graphs, prefill and decode, written by the families' own functions, all floats on grids.

    input   hidden                    codes [1, T, D]           token rows, looked up by the host
            cos, sin                  codes [1, T, 1, d]        of the tokens' positions; half of sin is negated
            mask                      codes [1, 1, T, C]        the highest code where a token sees another, else 0
            past.<i>.key, .value      codes [1, K * d, C - T], [1, K, (C - T) * d]
    output  logits                    codes [1, T, V]
            present.<i>.key, .value   codes [1, K * d, T], [1, K, T * d]: what the call adds to the cache

C is the context, T the tokens of a call: the target's prefill, or 1. Keys of the cache stand in front of the call's
own, in any order: the mask says who sees whom.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family, head
from afq_export.arch.static import StaticOps
from afq_export.lower.onnx.decoder import write_norm
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.operand import Operand, Shape, activate
from afq_export.lower.qnn.grids import quantized
from afq_export.lower.qnn.linears import write_linear
from afq_export.lower.qnn.parts import GraphParts
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear, StaticRange
from afq_export.quantize.tensors import SCORES, TABLES
from afq_export.spec.target import TargetProfile

MASK = "mask"


class GraphOps:
    """What `StaticOps` stands on: linears and norms as nodes."""

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
        return write_linear(x.graph, x, linear, self.target.kernel(linear.record.kernel))

    def norm(self, role: str, x: Operand) -> Operand:
        graph, shape = x.graph, x.shape
        weight = graph.tensor(f"{graph.scope}.{role}.weight", self.floats[f"{role}.weight"].float().numpy())
        rows = x.view(1, math.prod(shape[1:-1]), shape[-1])  # the HTP's norm of four dimensions is wrong
        return write_norm(self.config, rows, weight).view(shape)

    def activation(self, x: Operand) -> Operand:
        return activate(self.config.activation, x)


@dataclasses.dataclass(frozen=True)
class StaticGraph:
    """A finished graph; `inputs` and `outputs` with their shapes, `grids` of every value."""

    graph: OnnxGraph
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    grids: dict[str, StaticRange]


def write_graph(
    checkpoint: QuantizedCheckpoint, target: TargetProfile, tokens: int, context: int, progress: Progress
) -> StaticGraph:
    """The graph for calls of `tokens` tokens in a context of `context`. Reads the checkpoint block by block."""
    config, arch = checkpoint.config, family(checkpoint.config)
    graph, past = OnnxGraph("head"), context - tokens
    grids, presents = input_grids(checkpoint), {}
    width = config.head_dim
    x = Operand.of(graph, "hidden", (1, tokens, config.hidden))
    rope = tuple(Operand.of(graph, name, (1, tokens, 1, width)) for name in ("cos", "sin")) if config.rope else None
    for index in range(config.layers):
        progress("lower", index, config.layers + 2)
        graph.scope = f"blocks.{index}"
        ops = GraphOps(config, target, checkpoint.block(index), checkpoint.block_floats(index))
        visit = _Visit(checkpoint.block_tensors(index), grids)
        static = StaticOps(config, ops, visit, GraphParts(graph, index, past, presents))
        q, k, v = arch.attention_in(config, static, x, rope)
        x = arch.attention_out(config, static, x, static.attend(q, k, v))
    graph.scope = "head"
    ops = GraphOps(config, target, {"lm_head": checkpoint.linear("lm_head")}, checkpoint.head_floats())
    visit = _Visit(checkpoint.outer_tensors(), grids)
    logits = head(StaticOps(config, ops, visit), x)
    outputs = {operand.value: f"present.{name}" for name, operand in presents.items()} | {logits.value: "logits"}
    bits = checkpoint.tensors["hidden"].bits
    made, grids = quantized(graph, grids, outputs, bits)
    inputs = input_shapes(config, tokens, context)
    shapes: dict[str, Shape] = {"logits": logits.shape} | {f"present.{n}": x.shape for n, x in presents.items()}
    return StaticGraph(made, inputs, shapes, grids)


def input_shapes(config: DecoderConfig, tokens: int, context: int) -> dict[str, tuple[int, ...]]:
    """Shape of every input by name, in order."""
    past, heads, width = context - tokens, config.kv_heads, config.head_dim
    shapes = {"hidden": (1, tokens, config.hidden)}
    if config.rope:
        shapes |= dict.fromkeys(("cos", "sin"), (1, tokens, 1, width))
    shapes[MASK] = (1, 1, tokens, context)
    for index in range(config.layers):
        shapes |= {f"past.{index}.key": (1, heads * width, past), f"past.{index}.value": (1, heads, past * width)}
    return shapes


def input_grids(checkpoint: QuantizedCheckpoint) -> dict[str, StaticRange]:
    """Grid of every input. What the cache holds has that of what a call adds to it."""
    config, hidden = checkpoint.config, checkpoint.tensors["hidden"]
    grids = {"hidden": hidden, MASK: mask_grid(checkpoint)}
    if config.rope:
        grids |= {name: checkpoint.block_tensors(0)[name] for name in TABLES}
    for index in range(config.layers):
        tensors = checkpoint.block_tensors(index)
        grids |= {f"past.{index}.key": tensors["keys"], f"past.{index}.value": tensors["values"]}
    return grids


def mask_grid(checkpoint: QuantizedCheckpoint) -> StaticRange:
    """Two of its codes are used: the highest is 0, the lowest takes any score below every grid of scores.

    What is added to a score must be representable: -inf or float32's minimum on a grid of 8 or 16 bits leaves nothing
    of the scores themselves.
    """
    config = checkpoint.config
    scores = [checkpoint.block_tensors(index)[SCORES[0]] for index in range(config.layers)]
    scale = max(grid.scale for grid in scores)
    return StaticRange(float(np.float32(scale)), scores[0].qmax, scores[0].bits)


class _Visit:
    """Notes the grid of every value by its name within the block."""

    def __init__(self, named: Mapping[str, StaticRange], grids: dict[str, StaticRange]) -> None:
        self.named, self.grids = named, grids

    def __call__(self, name: str, x: Operand) -> Operand:
        self.grids[x.value] = self.named[name]
        return x
