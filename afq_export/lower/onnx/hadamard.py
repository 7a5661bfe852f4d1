"""The online matrices of a file (fold/online.py), Hadamard's and those behind norms: products of all tokens with one
float matrix each."""

from __future__ import annotations

import numpy as np

from afq_export.arch.ops import hadamard_matrix
from afq_export.lower.onnx.operand import Operand
from afq_export.spec.online import MATRIX_KIND

MATRIX = "hadamard"
"""The name of the matrix in the file."""

HADAMARD, BEHIND_NORM = "MatMul by a Hadamard matrix", "MatMul by a matrix behind a norm"
"""What these products are called where operators are counted: every other MatMul is a linear."""


def write_hadamard(x: Operand, size: int) -> Operand:
    """`x` [B, T, n] times the matrix of `size`, once for every `size` numbers."""
    rows = x.view(*x.shape[:-1], x.shape[-1] // size, size)
    return write_product(rows, x.graph.tensor(MATRIX, stored_matrix(size))).view(x.shape)


def write_product(x: Operand, matrix: str) -> Operand:
    """`x` [..., n] times `matrix` [n, n] of the graph."""
    return Operand.of(x.graph, x.graph.node("MatMul", [x.as_stored(x.shape), matrix]), x.shape)


def online_product(matrix: str) -> str:
    """What the product with the tensor `matrix` is, "" for a linear's."""
    return HADAMARD if matrix == MATRIX else BEHIND_NORM if matrix.endswith(f"norm.{MATRIX_KIND}") else ""


def stored_matrix(size: int) -> np.ndarray:
    """float32 [size, size]."""
    return hadamard_matrix(size).numpy()
