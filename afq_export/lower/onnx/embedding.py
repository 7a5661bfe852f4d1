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
        codes = _apart(graph, rows, shape[-1], embedding.bits) if embedding.bits < 8 else rows
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

    Codes of 4 and 2 bits lie in uint8 [V, D / 2] and [V, D / 4], two and four in each, the first in the low bits.
    """
    if embedding.scales is None:
        return {FLOATS: embedding.codes.float().numpy()}
    if is_shared(embedding, head, stored_bits):
        return {}
    codes = embedding.codes.numpy()
    if embedding.bits < 8:
        codes = packed(codes, embedding.bits)
    return {CODES: codes, SCALES: embedding.scales.float().numpy()}


def packed(codes_VD: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [V, D * bits / 8] of codes in two's complement, the first of a byte in its low bits."""
    parts = codes_VD.astype(np.uint8) & ((1 << bits) - 1)
    count = 8 // bits
    return np.bitwise_or.reduce([parts[:, place::count] << bits * place for place in range(count)])


def is_shared(embedding: QuantizedEmbedding, head: QuantizedLinear, stored_bits: int) -> bool:
    """Whether one tensor can be both: same codes, same scales, same bits in the file, float and 2-bit rows excluded."""
    same_form = embedding.bits == stored_bits != 2 and embedding.group == head.spec.weight.group
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


def _apart(graph: OnnxGraph, bytes_: str, width: int, bits: int) -> str:
    """Rows of uint8 with two codes of 4 bits, or four of 2, each: int8 codes [B, T, D]."""
    mask, middle, shifts = (1 << bits) - 1, 1 << bits - 1, range(bits, 8, bits)
    byte = {number: graph.constant(np.array(number, np.uint8), "byte") for number in sorted({*shifts, middle, mask})}
    names = ["low", *["middle"] * (len(shifts) - 1), "high"]
    parts = [graph.node("BitwiseAnd", [bytes_, byte[mask]], "embed_tokens.low")]
    for name, shift in zip(names[1:], shifts, strict=True):
        part = graph.node("BitShift", [bytes_, byte[shift]], f"embed_tokens.{name}", direction="RIGHT")
        last = shift + bits == 8
        parts.append(part if last else graph.node("BitwiseAnd", [part, byte[mask]], f"embed_tokens.{name}"))
    columns = [graph.node("Unsqueeze", [part, graph.integers(-1)], "embed_tokens.half") for part in parts]
    all_ = graph.node("Concat", columns, "embed_tokens.both", axis=-1)
    flat = graph.node("Reshape", [all_, graph.integers(0, 0, width)], "embed_tokens.unsigned")
    # Negative codes are stored as what they are more than 2^bits: (u ^ m) - m in two's complement.
    turned = graph.node("BitwiseXor", [flat, byte[middle]], "embed_tokens.turned")
    signed = graph.node("Cast", [turned], "embed_tokens.shifted", to=TensorProto.INT8)
    name = {4: "eight", 2: "two"}[bits]
    return graph.node("Sub", [signed, graph.constant(np.array(middle, np.int8), name)], "embed_tokens.signed")
