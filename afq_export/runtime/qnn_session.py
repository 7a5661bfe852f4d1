"""A Qualcomm bundle's two programs as one decoder: what a host has to do around the HTP (`runtime.session.Session`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from afq_export.errors import InputError
from afq_export.quantize.checkpoint import dequantize
from afq_export.runtime.onnxruntime import first_line
from afq_export.runtime.qnn import HOST, open_model, read_host_file
from afq_export.runtime.session import check_ids, greedy


class QnnSession:
    """`Session` of the programs in `folder`. `compiled`: of the contexts that a device loads, else of the graphs.

    A call of prefill takes its number of tokens, padded, as long as so many places are free; decode takes the others.
    Raises MissingToolError without the provider, InputError when a file is missing or not one of this package.
    """

    def __init__(self, folder: Path, *, compiled: bool = True) -> None:
        self._folder, self._file, self._compiled = folder, read_host_file(folder), compiled
        self._programs: dict[str, Any] = {}
        self._host = _Host(folder / HOST)
        steps = self._file.steps
        self.context, self.prefill = self._file.context, steps["prefill"].tokens
        self.vocab = steps["prefill"].outputs["logits"].shape[-1]
        self._cache = {
            name: np.full(
                (1, value.shape[1], self.context, value.shape[2] // (self.context - 1)), value.zero_point, value.dtype
            )
            for name, value in steps["decode"].inputs.items()
            if name.startswith("past.")
        }
        """Codes [1, rows, context, columns of a token]; the programs take them with the last two as one."""
        self._length = 0

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 [T, V] of a sequence from position 0 (see `Session`)."""
        return self.extend(ids, 0)

    def extend(self, ids: Tensor, position: int) -> Tensor:
        """Float32 [T, V] of tokens after `position` others (see `Session`)."""
        check_ids(self, self._folder, ids, position)
        if position > self._length:
            raise InputError("tokens after others that were not seen", why=f"position {position}, {self._length} seen")
        self._length, rows = position, []
        while len(ids):
            name = "prefill" if len(ids) > 1 and self._length + self.prefill <= self.context else "decode"
            taken = min(len(ids), self._file.steps[name].tokens)
            rows.append(self._call(name, ids[:taken].numpy()))
            ids = ids[taken:]
        return torch.cat(rows)

    def generate(self, ids: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
        """Greedy continuation (see `Session`): prefill for the prompt, decode for what follows."""
        return greedy(self, ids, tokens, stop)

    def feed(self, name: str, ids: np.ndarray) -> dict[str, np.ndarray]:
        """All inputs of the program `name`, as codes, for tokens that follow those in the cache."""
        step, places = self._file.steps[name], self.context
        tokens, past = step.tokens, places - step.tokens
        positions = np.minimum(np.arange(self._length, self._length + tokens), places - 1)
        padded = np.pad(ids, (0, tokens - len(ids)))
        floats = {"hidden": self._host.rows(padded, positions)}
        floats |= {table: values[positions][:, None] for table, values in self._host.tables.items()}
        codes = {key: step.inputs[key].codes(values[None]) for key, values in floats.items()}
        seen = np.zeros((tokens, places), bool)
        seen[:, : self._length] = True
        seen[:, past:] = np.tri(tokens, dtype=bool)
        mask = step.inputs["mask"]
        codes["mask"] = np.where(seen, (1 << mask.bits) - 1, 0).astype(mask.dtype)[None, None]
        return codes | {key: cache[:, :, :past].reshape(*cache.shape[:2], -1) for key, cache in self._cache.items()}

    def run(self, name: str, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Codes of all outputs of the program `name`."""
        outputs = list(self._file.steps[name].outputs)
        try:
            return dict(zip(outputs, self._program(name).run(outputs, feed), strict=True))
        except Exception as error:  # ONNX Runtime's own errors have no common base besides it
            raise InputError("the program does not run", where=name, why=first_line(error)) from error

    def _call(self, name: str, ids: np.ndarray) -> Tensor:
        step, count = self._file.steps[name], len(ids)
        found = self.run(name, self.feed(name, ids))
        for key, cache in self._cache.items():
            new = found[key.replace("past.", "present.")].reshape(*cache.shape[:2], step.tokens, -1)
            cache[:, :, self._length : self._length + count] = new[:, :, :count]
        self._length += count
        return torch.from_numpy(step.outputs["logits"].values(found["logits"][0, :count]))

    def _program(self, name: str) -> Any:
        if name not in self._programs:
            path = self._folder / f"{name}{'_ctx' if self._compiled else ''}.onnx"
            if not path.is_file():
                raise InputError("no program", where=str(path))
            self._programs[name] = open_model(path, self._file)
        return self._programs[name]


class _Host:
    """Token rows, learned positions and rotary tables."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="np") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError("cannot read the host's tables", where=str(path), why=str(error)) from error
        self.codes = tensors.pop("embed_tokens.codes")
        self.scales = tensors.pop("embed_tokens.scales", None)
        self.tables = tensors

    def rows(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Float32 [T, D]."""
        codes = torch.from_numpy(self.codes[ids])
        if self.scales is None:
            return codes.numpy()
        scales = torch.from_numpy(self.scales[ids])
        group = codes.shape[1] // scales.shape[1] if scales.shape[1] > 1 else 0
        return dequantize(codes, scales, group).numpy()
