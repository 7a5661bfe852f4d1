"""Activations of all calibration windows: in memory, or in memory-mapped files when they would take too much of it.

A file has no name any more once it is open, so nothing of it is left when its tensor is dropped, the run ends or is
killed. Rows are copied out when they are read and the mapping's pages given back: what is resident is one batch.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from afq_export.errors import InputError
from afq_export.files import refuse_unwritable
from afq_export.machine import memory_mb

HELD = 6
"""Copies of all activations at a block's end, at most: inputs and outputs of both paths, a target, a result."""
SHARE = 0.25
"""Of the installed memory: what activations may take when nothing is said."""


class Rows(Protocol):
    """Float32 [N, T, D], read by windows. A Tensor is one."""

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, windows: Tensor) -> Tensor: ...

    def split(self, size: int) -> Iterable[Tensor]: ...


CPU = torch.device("cpu")


class SpilledRows:
    """Rows in a file, read to `device`. Raises InputError when there is no room for it."""

    def __init__(self, folder: Path, shape: torch.Size, device: torch.device = CPU) -> None:
        self.shape, self.device, size = shape, device, 4 * shape.numel()
        refuse_unwritable(folder / "activations")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                _reserve(file.fileno(), size)
                self._mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            why = f"{size / 1e6:,.0f} MB of activations: {error.strerror or error}"
            do = "free space, allow more --activation-memory-mb, or take fewer samples"
            raise InputError("cannot spill activations", where=str(folder), why=why, do=do) from error
        self._rows = torch.frombuffer(self._mapped, dtype=torch.float32).view(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, windows: Tensor) -> Tensor:
        """A copy of these windows."""
        rows = self._rows[windows].to(self.device)
        self._release()
        return rows

    def split(self, size: int) -> Iterator[Tensor]:
        """Copies of `size` windows at a time."""
        for start in range(0, len(self), size):
            rows = self._rows[start : start + size].to(self.device, copy=True)
            self._release()
            yield rows

    def write(self, start: int, rows: Tensor) -> None:
        """Puts `rows` from window `start` on."""
        self._rows[start : start + len(rows)] = rows
        self._release()

    def _release(self) -> None:
        """Pages that were touched are no longer this process' memory; the system keeps or writes them as it likes."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class ActivationStore:
    """Where activations go, None is memory, and what computes with them."""

    folder: Path | None = None
    device: torch.device = CPU

    def collect(self, parts: Iterable[Tensor], shape: torch.Size) -> Rows:
        """The windows of `parts`, one behind the other, [N, T, D] together."""
        if self.folder is None:
            return torch.cat(list(parts))
        rows, start = SpilledRows(self.folder, shape, self.device), 0
        for part in parts:
            rows.write(start, part)
            start += len(part)
        return rows


IN_MEMORY = ActivationStore()


@dataclasses.dataclass(frozen=True)
class Activations:
    """MB that activations take at most, and that they may take of the memory; None: nobody knows how much there is."""

    needed_mb: float
    budget_mb: float | None

    @property
    def spilled(self) -> bool:
        """Whether they go to files."""
        return self.budget_mb is not None and self.needed_mb > self.budget_mb

    @staticmethod
    def of(windows: int, length: int, hidden: int, budget_mb: float | None) -> Activations:
        """Of that many windows; without a budget they may take SHARE of the memory there is."""
        there = memory_mb()
        usual = None if there is None else SHARE * there
        return Activations(HELD * windows * length * hidden * 4 / 1e6, usual if budget_mb is None else budget_mb)


def choose_store(activations: Activations, folder: Path, device: torch.device = CPU) -> ActivationStore:
    """Memory, or files in `folder` for what is more than may be there."""
    return ActivationStore(folder if activations.spilled else None, device)


def _reserve(file: int, size: int) -> None:
    """Takes the room now: on a full disk a write to a mapping would end the process."""
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
