"""What the host does around the graph, in numpy: tables, and the inputs of a call."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from afq_export.arch.attention import rope_tables
from afq_export.arch.config import DecoderConfig
from afq_export.errors import InputError
from afq_export.lower.tosa.decoder import COS_STEPS, Shape
from afq_export.lower.tosa.operand import HALF, stored
from afq_export.quantize.checkpoint import QuantizedCheckpoint

TABLES = ("rows", "row_steps", "cos", "sin")


@dataclasses.dataclass(frozen=True)
class HostTables:
    """rows i8 [V, D], row_steps i16 [V, G], cos and sin i16 [S, d]; the step of a logit."""

    rows: np.ndarray
    row_steps: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    logit_step: float
    shape: Shape

    @property
    def bytes(self) -> int:
        """Of all four."""
        return sum(getattr(self, name).nbytes for name in TABLES)


def host_tables(checkpoint: QuantizedCheckpoint, shape: Shape) -> HostTables:
    """The tables for all positions of `shape`."""
    embedding, config = checkpoint.embedding(), checkpoint.config
    scales = embedding.scales.double().numpy()
    steps = np.rint(scales / scales.max() * HALF).astype(np.int16)
    logit_step, _, _ = stored(checkpoint.outer_tensors()["lm_head"])
    return HostTables(embedding.codes.numpy(), steps, *rotary_codes(config, shape.past), logit_step, shape)


def save_tables(tables: HostTables, path: Path) -> None:
    """The tables as safetensors, numbers as its metadata."""
    numbers = {"logit_step": repr(tables.logit_step)} | {
        name: str(size) for name, size in dataclasses.asdict(tables.shape).items()
    }
    path.write_bytes(save({name: np.ascontiguousarray(getattr(tables, name)) for name in TABLES}, numbers))


def load_tables(path: Path) -> HostTables:
    """Inverse of `save_tables`. Raises InputError for another file."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays, numbers = {name: file.get_tensor(name) for name in TABLES}, file.metadata()
        shape = Shape(int(numbers["tokens"]), int(numbers["past"]))
        return HostTables(**arrays, logit_step=float(numbers["logit_step"]), shape=shape)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError("cannot read the host's tables", where=str(path), why=str(error)) from error


def rotary_codes(config: DecoderConfig, context: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin i16 [S, d] in steps of the attention factor over 2^14; the first half of sin has its sign turned."""
    cos, sin = (t.numpy() for t in rope_tables(config.rope, torch.arange(context), torch.float64))
    sin = np.concatenate((-sin[:, : config.head_dim // 2], sin[:, config.head_dim // 2 :]), axis=1)
    codes = [np.rint(t / config.rope.attention_factor * COS_STEPS).astype(np.int16) for t in (cos, sin)]
    return codes[0], codes[1]


def call_inputs(tables: HostTables, ids: np.ndarray, position: int, tokens: int) -> dict[str, np.ndarray]:
    """All but the cache for a call of T = `tokens`: `ids` [n <= T] behind `position` others, token 0 after them."""
    past = tables.shape.past
    ids = np.concatenate((ids, np.zeros(tokens - len(ids), ids.dtype)))
    where = np.minimum(np.arange(position, position + tokens), len(tables.cos) - 1)
    mask = np.full((1, tokens, past + tokens), -1, np.int8)
    mask[:, :, :position] = 0
    mask[0, :, past:] -= np.tril(np.full((tokens, tokens), -1, np.int8))
    return {
        "rows": tables.rows[ids][None],
        "row_steps": tables.row_steps[ids][None],
        "cos": tables.cos[where][None, :, None, :],
        "sin": tables.sin[where][None, :, None, :],
        "mask": mask,
    }
