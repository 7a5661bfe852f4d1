"""What of a file runs as an integer kernel, what as a float operator, and why."""

from __future__ import annotations

from afq_export.lower.float_operators import coverage_with
from afq_export.lower.onnx.hadamard import BEHIND_NORM, HADAMARD
from afq_export.lower.onnx.readback import OnnxContent
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec.report import Coverage

REASONS = {
    "Attention": "float32: the runtime has no attention on integers with a cache",
    "RMSNormalization": "float32: norms are a thousandth of the arithmetic and most of its range",
    "LayerNormalization": "float32: norms are a thousandth of the arithmetic and most of its range",
    "RotaryEmbedding": "float32: turns queries and keys by their position",
    HADAMARD: "float32: spreads outliers over the input of the MLP's last linear, because the recipe says so",
    BEHIND_NORM: "float32: the inverse of the matrix that the linears behind it have, because the recipe says so",
    "Sigmoid": "float32: the MLP's nonlinearity",
    "Gelu": "float32: the MLP's nonlinearity",
    "Relu": "float32: the MLP's nonlinearity",
}
"""Operator that stays float -> why. The rest is quantization, sums, look-ups and shapes."""


def coverage_of(checkpoint: QuantizedCheckpoint, content: OnnxContent) -> Coverage:
    """Every linear with its kernel, and every operator that computes in float, with its reason."""
    return coverage_with(checkpoint, content.operators, REASONS)
