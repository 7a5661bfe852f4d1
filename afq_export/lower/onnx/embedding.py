"""Token ids to float32 rows, from codes that are looked up first and dequantized then: never the whole table a step."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto

from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.operand import Operand
from afq_export.quantize.assign import HEAD
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedEmbedding, QuantizedLinear
from afq_export.spec.target import TargetProfile

FLOATS, CODES, SCALES = "embed_tokens.weight", "embed_tokens.codes", "embed_tokens.scales"
"""Names of the embedding's tensors."""


def write_rows(graph: OnnxGraph, checkpoint: QuantizedCheckpoint, target: TargetProfile, ids: Operand) -> Operand:
    """Rows [B, T, D] of the ids [B, T].

    When the head has the embedding's very codes and scales, the head's tensors are looked up instead of a second copy.
    """
    embedding, head = checkpoint.embedding(), checkpoint.linear(HEAD)
    stored_bits = target.kernel(head.record.kernel).stored_bits
    tables = {name: graph.tensor(name, array) for name, array in stored_tables(embedding, head, stored_bits).items()}
    shape = (*ids.shape, checkpoint.config.hidden)
    if embedding.bits == 32:
        return Operand.of(graph, graph.node("Gather", [tables[FLOATS], ids.value], "embed_tokens"), shape)
    if tables:
        rows = graph.node("Gather", [tables[CODES], ids.value], "embed_tokens.rows")
        codes = _apart(graph, rows, shape[-1]) if embedding.bits == 4 else rows
        scales = graph.node("Gather", [tables[SCALES], ids.value], "embed_tokens.steps")
    else:
        codes, scales = _from_head(graph, head, ids.value, stored_bits)
    values = graph.node("Cast", [codes], "embed_tokens.values", to=TensorProto.FLOAT)
    if not embedding.group:
        return Operand.of(graph, graph.node("Mul", [values, scales], "embed_tokens"), shape)
    groups = shape[-1] // embedding.group
    grouped = graph.node("Reshape", [values, graph.integers(0, 0, groups, embedding.group)], "embed_tokens.groups")
    scales = graph.node("Unsqueeze", [scales, graph.integers(-1)], "embed_tokens.column")
    scaled = graph.node("Mul", [grouped, scales], "embed_tokens.scaled")
    return Operand.of(graph, graph.node("Reshape", [scaled, graph.integers(0, 0, shape[-1])], "embed_tokens"), shape)


def stored_tables(embedding: QuantizedEmbedding, head: QuantizedLinear, stored_bits: int) -> dict[str, np.ndarray]:
    """The embedding's own tensors in the file by name, none when it shares the head's.

    int4 codes lie in uint8 [V, D / 2], two in each, the first in the low bits.
    """
    if embedding.scales is None:
        return {FLOATS: embedding.codes.float().numpy()}
    if is_shared(embedding, head, stored_bits):
        return {}
    codes = embedding.codes.numpy()
    if embedding.bits == 4:
        nibbles = codes.astype(np.uint8) & 15
        codes = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return {CODES: codes, SCALES: embedding.scales.float().numpy()}


def is_shared(embedding: QuantizedEmbedding, head: QuantizedLinear, stored_bits: int) -> bool:
    """Whether one tensor can be both: same codes, same scales, same bits in the file, float rows excluded."""
    same_form = embedding.bits == stored_bits and embedding.group == head.spec.weight.group
    return (
        same_form
        and embedding.scales is not None
        and torch.equal(embedding.codes, head.codes)
        and torch.equal(embedding.scales, head.scales)
    )


def _from_head(graph: OnnxGraph, head: QuantizedLinear, ids: str, stored_bits: int) -> tuple[str, str]:
    """Codes [B, T, D] and scales [B, T, G] out of the head's tensors, which lie [D, V] and [G, V] or [V].

    The head's writer adds the tensors; here they are named. int4 codes are cast first, since Gather takes no int4, and
    scales of groups are turned: the runtime does both once, when it loads the file, and makes the head's MatMul an
    integer kernel only when no other node looks at its scales.
    """
    codes = f"{HEAD}.codes"
    if stored_bits == 4:
        codes = graph.node("Cast", [codes], "embed_tokens.bytes", to=TensorProto.INT8)
    codes = graph.node("Gather", [codes, ids], "embed_tokens.columns", axis=1)
    codes = graph.node("Transpose", [codes], "embed_tokens.codes", perm=[1, 2, 0])
    if not head.spec.weight.group:
        scales = graph.node("Gather", [f"{HEAD}.scales", ids], "embed_tokens.steps")
        return codes, graph.node("Unsqueeze", [scales, graph.integers(-1)], "embed_tokens.column")
    rows = graph.node("Transpose", [f"{HEAD}.scales"], "embed_tokens.scale_rows", perm=[1, 0])
    return codes, graph.node("Gather", [rows, ids], "embed_tokens.steps")


def _apart(graph: OnnxGraph, pairs: str, width: int) -> str:
    """Rows of uint8 with two codes each: int8 codes [B, T, D]."""
    byte = {number: graph.constant(np.array(number, np.uint8), "byte") for number in (4, 8, 15)}
    low = graph.node("BitwiseAnd", [pairs, byte[15]], "embed_tokens.low")
    high = graph.node("BitShift", [pairs, byte[4]], "embed_tokens.high", direction="RIGHT")
    columns = [graph.node("Unsqueeze", [half, graph.integers(-1)], "embed_tokens.half") for half in (low, high)]
    both = graph.node("Concat", columns, "embed_tokens.both", axis=-1)
    flat = graph.node("Reshape", [both, graph.integers(0, 0, width)], "embed_tokens.unsigned")
    # Codes of -8 to -1 are stored as 8 to 15: (u ^ 8) - 8 in two's complement.
    turned = graph.node("BitwiseXor", [flat, byte[8]], "embed_tokens.turned")
    signed = graph.node("Cast", [turned], "embed_tokens.shifted", to=TensorProto.INT8)
    return graph.node("Sub", [signed, graph.constant(np.array(8, np.int8), "eight")], "embed_tokens.signed")
