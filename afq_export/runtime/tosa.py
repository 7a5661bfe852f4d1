"""Runs TOSA programs: on Arm's reference model, or on our numpy operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afq_export.errors import InputError, MissingToolError
from afq_export.extras import ETHOS_U
from afq_export.lower.tosa.graph import TosaGraph
from afq_export.lower.tosa.host import HostTables, call_inputs
from afq_export.runtime.session import check_ids, greedy
from afq_export.stdout import standard_output_closed

Execute = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Inputs of a graph by name -> its outputs by name."""


def require_reference_model() -> Any:
    """Arm's reference model. Raises MissingToolError without it."""
    try:
        import tosa_reference_model
    except ImportError as error:
        raise MissingToolError("TOSA programs run on Arm's reference model", why=str(error), do=ETHOS_U) from error
    return tosa_reference_model


def reference_model(program: bytes, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Execute:
    """A TOSA flatbuffer on Arm's reference model. Raises MissingToolError without it.

    The returned function raises InputError for a program that the reference model calls invalid or unpredictable.
    """
    tosa_reference_model = require_reference_model()

    def execute(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = [np.ascontiguousarray(arrays[name]) for name in inputs]
        with standard_output_closed():  # it prints a line about versions for every call
            found, status = tosa_reference_model.run(program, given)
        if status != tosa_reference_model.GraphStatus.TOSA_VALID:
            raise InputError("the TOSA reference model refuses the program", why=str(status))
        return dict(zip(outputs, found, strict=True))

    return execute


class TosaSession:
    """`Session` of a decoder graph: the host's part in numpy, the graph by `execute`; `decode` executes the one that
    takes a single token, where there is one."""

    def __init__(
        self, graph: TosaGraph, tables: HostTables, execute: Execute, path: Path, decode: Execute | None = None
    ) -> None:
        self._tables, self._execute, self._path, self._decode = tables, execute, path, decode
        self.vocab, self.context, self.prefill = len(tables.rows), tables.shape.past, tables.shape.tokens
        self._cache = {
            name: np.zeros(graph.values[name].shape, np.int8) for name in graph.inputs if name.startswith("past.")
        }

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 [T, V] of a sequence from position 0 (see `Session`)."""
        return self.extend(ids, 0)

    def extend(self, ids: Tensor, position: int) -> Tensor:
        """Float32 [T, V] of tokens after `position` others (see `Session`)."""
        check_ids(self, self._path, ids, position)
        rows = [self._call(part, position + start * self.prefill) for start, part in enumerate(ids.split(self.prefill))]
        return torch.cat(rows)

    def generate(self, ids: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
        """Greedy continuation (see `Session`)."""
        return greedy(self, ids, tokens, stop)

    def _call(self, ids: Tensor, position: int) -> Tensor:
        alone = self._decode is not None and len(ids) == 1
        execute, tokens = (self._decode, 1) if alone else (self._execute, self.prefill)
        outputs = execute(call_inputs(self._tables, ids.numpy(), position, tokens) | self._cache)
        for name, cache in self._cache.items():
            new = outputs[name.replace("past.", "new.")]
            if name.endswith("key"):
                cache[:, :, position : position + len(ids)] = new[:, :, : len(ids)]
            else:
                cache[:, position : position + len(ids)] = new[:, : len(ids)]
        return torch.from_numpy(outputs["logits"][0, : len(ids)].astype(np.float32)) * self._tables.logit_step
