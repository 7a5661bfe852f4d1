"""What of a program runs as an integer kernel, what as a float operator, and why."""

from __future__ import annotations

from afq_export.lower.float_operators import coverage_with
from afq_export.lower.openvino.readback import OpenvinoContent
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec.report import Coverage

REASONS = {
    "ScaledDotProductAttention": "float32: the cache is float32 (KV_CACHE_PRECISION), softmax has no integer kernel",
    "ReduceMean": "float32: RMSNorm, a thousandth of the arithmetic and most of its range",
    "MVN": "float32: LayerNorm, a thousandth of the arithmetic and most of its range",
    "Split": "float32: rotary embedding, which turns queries and keys by their position",
    "Swish": "float32: the MLP's nonlinearity",
    "Gelu": "float32: the MLP's nonlinearity",
    "Relu": "float32: the MLP's nonlinearity",
}
"""Operator by which a float part is known -> what it is and why it stays. The rest is sums, look-ups and shapes."""


def coverage_of(checkpoint: QuantizedCheckpoint, content: OpenvinoContent) -> Coverage:
    """Every linear with its kernel, and every operator that computes in float, with its reason."""
    return coverage_with(checkpoint, content.operators, REASONS)
