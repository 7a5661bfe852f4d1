"""What is kept of every predicted token, as arrays and as the columns of a baseline."""

from __future__ import annotations

import dataclasses

import numpy as np

from afq_export.errors import InputError
from afq_export.spec.baseline import Columns

KEPT = 8
"""Likeliest choices that are kept of a token."""
STEP = 1 / 2048
"""Nats between neighbouring stored log-probabilities."""
FLOOR = (1 << 16) - 1
"""The last step, 32 nats: a log-probability at or below it is stored as it."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """N windows of P predicted tokens: `nll` float32, `top1` and `digest` uint32 [N, P]; `ids` uint32 [N, P, K] and
    `logs` uint16 [N, P, K + 1] as in `Columns`, of this file's own choices."""

    nll: np.ndarray
    top1: np.ndarray
    digest: np.ndarray
    ids: np.ndarray
    logs: np.ndarray


def steps(logs: np.ndarray) -> np.ndarray:
    """Log-probabilities as uint16 steps below 0; what is no number as the last."""
    down = np.nan_to_num(-logs / STEP, nan=FLOOR, posinf=FLOOR, neginf=0)
    return np.rint(np.clip(down, 0, FLOOR)).astype(np.uint16)


def nats(stored: np.ndarray) -> np.ndarray:
    """Inverse of `steps`, float64, made to sum to one again over the last axis after the rounding."""
    logs = stored.astype(np.float64) * -STEP
    return logs - np.log(np.exp(logs).sum(axis=-1, keepdims=True))


def to_columns(tokens: Tokens) -> Columns:
    """`tokens` as bytes."""
    return Columns(
        nll=_bytes(tokens.nll, "<f4"),
        top1=_bytes(tokens.top1, "<u4"),
        digest=_bytes(tokens.digest, "<u4"),
        ids=_bytes(np.moveaxis(tokens.ids, -1, 0), "<u4"),
        logs=_bytes(np.moveaxis(tokens.logs, -1, 0), "<u2"),
    )


def from_columns(columns: Columns, windows: int, predicted: int, where: str) -> Tokens:
    """Inverse of `to_columns`. Raises InputError when a column has another length, or a loss is not finite."""
    shape = (windows, predicted)
    kept = len(columns.ids) // max(1, 4 * windows * predicted)
    return Tokens(
        nll=losses(columns.nll, windows, predicted, where),
        top1=_array(columns.top1, "<u4", shape, "top1", where),
        digest=_array(columns.digest, "<u4", shape, "digest", where),
        ids=np.moveaxis(_array(columns.ids, "<u4", (kept, *shape), "ids", where), 0, -1),
        logs=np.moveaxis(_array(columns.logs, "<u2", (kept + 1, *shape), "logs", where), 0, -1),
    )


def losses(data: bytes, windows: int, predicted: int, where: str) -> np.ndarray:
    """Float32 [N, P] of a column of losses. Raises InputError as `from_columns` does."""
    nll = _array(data, "<f4", (windows, predicted), "nll", where)
    if not np.isfinite(nll).all():
        raise InputError("the baseline is damaged", where=where, why="a loss is not finite")
    return nll


def _bytes(array: np.ndarray, kind: str) -> bytes:
    return np.ascontiguousarray(array, dtype=kind).tobytes()


def _array(data: bytes, kind: str, shape: tuple[int, ...], name: str, where: str) -> np.ndarray:
    wanted = int(np.prod(shape)) * np.dtype(kind).itemsize
    if len(data) != wanted:
        raise InputError("the baseline is damaged", where=where, why=f"{name} has {len(data)} bytes, not {wanted}")
    return np.frombuffer(data, kind).reshape(shape)
