"""The online Hadamard matrices of a file (fold/online.py): one product of all tokens, one float matrix."""

from __future__ import annotations

import numpy as np

from afq_export.arch.ops import hadamard_matrix
from afq_export.lower.onnx.operand import Operand

MATRIX = "hadamard"
"""The name of the matrix in the file."""


def write_hadamard(x: Operand, size: int) -> Operand:
    """`x` [B, T, n] times the matrix of `size`, once for every `size` numbers."""
    rows = x.view(*x.shape[:-1], x.shape[-1] // size, size)
    value = x.graph.node("MatMul", [rows.as_stored(rows.shape), x.graph.tensor(MATRIX, stored_matrix(size))])
    return Operand.of(x.graph, value, rows.shape).view(x.shape)


def stored_matrix(size: int) -> np.ndarray:
    """float32 [size, size]."""
    return hadamard_matrix(size).numpy()
