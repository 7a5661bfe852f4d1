"""Writes the decoder as one Core ML function: tokens and their position in, logits out, KV caches as states.

    main(tokens int32 [1, T], input_pos int32 [1]) -> logits float32 [1, T, V]      1 <= T <= prefill
    key_cache_<i>, value_cache_<i>                    float16 [1, K, S, d], states that the program updates in place

Weights are integers with float16 scales (`constexpr_blockwise_shift_scale`), arithmetic is float16, norms are float32:
their squares leave float16's range at 256. Positions from `input_pos` on are overwritten, and only positions up to each
token's own are attended to, so a call at position 0 starts afresh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types
from torch import Tensor

from afq_export.arch.attention import rope_tables
from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family, head
from afq_export.arch.ops import PlainSums
from afq_export.lower.coreml.operand import TOKENS, Operand
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedEmbedding, QuantizedLinear

HIDDEN = np.float16(-30_000)
"""Added to the score of a position that is not attended to: a number of float16, so that no infinity meets another."""
INT4_BITS = 4


@dataclasses.dataclass(frozen=True)
class Positions:
    """What every block needs of the call's positions: first and last + 1, and the mask [1, 1, repeats * T, S]."""

    begin: Any
    end: Any
    mask: Any


class MilOps(PlainSums):
    """`arch.ops.Ops` whose operations append to the program."""

    def __init__(
        self, config: DecoderConfig, linears: Mapping[str, QuantizedLinear], floats: Mapping[str, Tensor]
    ) -> None:
        self.config, self.linears, self.floats = config, linears, floats

    def linear(self, role: str, x: Operand) -> Operand:
        linear = self.linears[role]
        name = value_name(linear.spec.name)
        weight = integers(
            linear.codes.numpy(), linear.scales.numpy().astype(np.float16), linear.spec.weight.bits, f"{name}_weight"
        )
        bias = {} if linear.bias is None else {"bias": linear.bias.float().numpy().astype(np.float16)}
        return Operand(mb.linear(x=x.value, weight=weight, name=name, **bias), (*x.shape[:-1], linear.spec.outputs))

    def norm(self, role: str, x: Operand) -> Operand:
        weight, bias = (self._float(f"{role}.{kind}") for kind in ("weight", "bias"))
        wide, epsilon = mb.cast(x=x.value, dtype="fp32"), np.float32(self.config.norm_eps)
        if self.config.family == "opt":
            y = mb.layer_norm(x=wide, axes=[-1], gamma=weight, beta=bias, epsilon=epsilon)
            return x.to(mb.cast(x=y, dtype="fp16"))
        square = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
        y = mb.mul(x=mb.mul(x=wide, y=mb.rsqrt(x=square, epsilon=epsilon)), y=weight)
        y = y if bias is None else mb.add(x=y, y=bias)
        return x.to(mb.cast(x=y, dtype="fp16"))

    def rotate(self, x: Operand, rope: tuple[Any, Any]) -> Operand:
        half = x.shape[-1] // 2
        ends = {"end_mask": [True] * 3 + [False], "begin_mask": [True] * 3 + [False]}
        first = mb.slice_by_index(x=x.value, begin=[0] * 4, end=[0, 0, 0, half], **ends)
        second = mb.slice_by_index(x=x.value, begin=[0, 0, 0, half], end=[0, 0, 0, 2 * half], **ends)
        turned = mb.concat(values=[mb.mul(x=second, y=np.float16(-1)), first], axis=-1)
        return x.to(mb.add(x=mb.mul(x=x.value, y=rope[0]), y=mb.mul(x=turned, y=rope[1])))

    def activation(self, x: Operand) -> Operand:
        match self.config.activation:
            case "silu":
                return x.to(mb.silu(x=x.value))
            case "relu":
                return x.to(mb.relu(x=x.value))
        mode = "TANH_APPROXIMATION" if self.config.activation == "gelu_tanh" else "EXACT"
        return x.to(mb.gelu(x=x.value, mode=mode))

    def _float(self, name: str) -> np.ndarray | None:
        tensor = self.floats.get(name)
        return None if tensor is None else tensor.float().numpy()


def build_program(
    checkpoint: QuantizedCheckpoint, context: int, tokens: ct.RangeDim, opset: ct.target, progress: Progress
) -> Program:
    """The program for T in `tokens`. All weights are in memory while it is written."""
    config, arch = checkpoint.config, family(checkpoint.config)
    cache = (1, config.kv_heads, context, config.head_dim)
    inputs = {
        "tokens": mb.placeholder((1, tokens.symbol), dtype=types.int32, name="tokens"),
        "input_pos": mb.placeholder((1,), dtype=types.int32, name="input_pos"),
    }
    for index in range(config.layers):
        for kind in ("key", "value"):
            inputs[f"{kind}_cache_{index}"] = mb.state_tensor_placeholder(cache, types.fp16)
    with Function(inputs, opset_version=opset) as function:
        ids, start = function.inputs["tokens"], function.inputs["input_pos"]
        count = mb.slice_by_index(x=mb.shape(x=ids), begin=[1], end=[2])
        places = mb.add(x=mb.range_1d(start=0, end=mb.squeeze(x=count), step=1), y=start)
        positions = _positions(config, start, count, places, context)
        rope = _rope(config, places, context)
        x = _embed(checkpoint, ids, places)
        for index in range(config.layers):
            ops = MilOps(config, checkpoint.block(index), checkpoint.block_floats(index))
            q, k, v = arch.attention_in(config, ops, x, rope)
            states = [function.inputs[f"{kind}_cache_{index}"] for kind in ("key", "value")]
            x = arch.attention_out(config, ops, x, _attend(config, q, k, v, states, positions))
            progress("lower", index + 1, config.layers + 2)
        logits = head(MilOps(config, {"lm_head": checkpoint.linear("lm_head")}, checkpoint.head_floats()), x)
        function.set_outputs([mb.cast(x=logits.value, dtype="fp32", name="logits")])
    program = Program()
    program.add_function("main", function)
    return program


def integers(codes: np.ndarray, scales: np.ndarray, bits: int, name: str) -> Any:
    """A constant of integer codes [O, I] and scales [O, G] that is dequantized by Core ML; int4 up to 4 bits."""
    kind = types.nptype_from_builtin(types.int4) if bits <= INT4_BITS else np.int8
    return mb.constexpr_blockwise_shift_scale(data=codes.astype(kind), scale=scales, name=name)


def value_name(name: str) -> str:
    """A linear's name as the language allows it."""
    return name.replace(".", "_")


def _positions(config: DecoderConfig, start: Any, count: Any, places: Any, context: int) -> Positions:
    """Rows of the mask are query heads of one KV head, one after the other, each with its T tokens."""
    order = np.arange(context, dtype=np.int32)[None]
    later = mb.cast(x=mb.greater(x=order, y=mb.expand_dims(x=places, axes=[1])), dtype="fp16")
    mask = mb.expand_dims(x=mb.mul(x=later, y=HIDDEN), axes=[0, 1])
    mask = mask if config.repeats == 1 else mb.tile(x=mask, reps=[1, 1, config.repeats, 1])
    zero = np.zeros(2, np.int32)
    last = np.zeros(1, np.int32)
    begin = mb.concat(values=[zero, start, last], axis=0)
    return Positions(begin, mb.concat(values=[zero, mb.add(x=start, y=count), last], axis=0), mask)


def _rope(config: DecoderConfig, places: Any, context: int) -> tuple[Any, Any] | None:
    """cos and sin [1, T, 1, d] of the call's positions, as the families hand them to `rotate`."""
    if config.rope is None:
        return None
    tables = (table.numpy().astype(np.float16) for table in rope_tables(config.rope, torch.arange(context)))
    cos, sin = (mb.expand_dims(x=mb.gather(x=table, indices=places, axis=0), axes=[0, 2]) for table in tables)
    return cos, sin


def _embed(checkpoint: QuantizedCheckpoint, ids: Any, places: Any) -> Operand:
    config = checkpoint.config
    rows = mb.cast(x=mb.gather(x=_rows(checkpoint.embedding()), indices=ids, axis=0), dtype="fp16")
    x = Operand(rows, (1, TOKENS, config.hidden))
    table = checkpoint.embedding_floats().get("embed_positions.weight")
    if table is None:
        return x
    learned = table.float().numpy().astype(np.float16)
    return x.to(mb.add(x=x.value, y=mb.gather(x=learned, indices=mb.add(x=places, y=config.position_offset), axis=0)))


def _rows(embedding: QuantizedEmbedding) -> Any:
    """Token rows: float32 scales as the checkpoint has them, or float32 rows."""
    codes = embedding.codes.numpy()
    if embedding.scales is None:
        return codes.astype(np.float32)
    return integers(codes, embedding.scales.float().numpy(), embedding.bits, "embed_tokens")


def _attend(
    config: DecoderConfig, q: Operand, k: Operand, v: Operand, states: list[Any], positions: Positions
) -> Operand:
    """The caches take k and v; every KV head's queries attend to them together, so that no cache is copied."""
    shape = (1, config.kv_heads, -1, config.head_dim)
    query = mb.reshape(x=mb.transpose(x=q.value, perm=[0, 2, 1, 3]), shape=list(shape))
    keys, values = (
        _update(state, mb.transpose(x=new.value, perm=[0, 2, 1, 3]), positions)
        for state, new in zip(states, (k, v), strict=True)
    )
    out = mb.scaled_dot_product_attention(query=query, key=keys, value=values, attn_mask=positions.mask)
    heads = mb.reshape(x=out, shape=[1, config.heads, -1, config.head_dim])
    return Operand(mb.transpose(x=heads, perm=[0, 2, 1, 3]), q.shape)


def _update(state: Any, new: Any, positions: Positions) -> Any:
    """The state with `new` [1, K, T, d] from the first position on."""
    masks = [True, True, False, True]
    changed = mb.slice_update(
        x=mb.read_state(input=state),
        update=new,
        begin=positions.begin,
        end=positions.end,
        begin_mask=masks,
        end_mask=masks,
    )
    return mb.coreml_update_state(state=state, value=changed)
