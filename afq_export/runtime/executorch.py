"""Runs exported .pte programs through ExecuTorch's own runtime on this machine."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afq_export.errors import InputError
from afq_export.runtime.library import load_runtime
from afq_export.runtime.session import check_ids, greedy

IDENTIFIER = b"ET12"
HEADER_MAGIC = b"eh00"
HEADER_SIZE = 40
"""First bytes of a program: 4 bytes offset, identifier, header magic, header length (u32), then three u64 sizes."""


class ExecutorchSession:
    """`Session` of a .pte that `lower_program` made.

    Raises MissingToolError without ExecuTorch, InputError when the file is missing, truncated, or another program.
    """

    def __init__(self, path: Path) -> None:
        runtime = load_runtime()
        check_program_file(path)
        self._path = path
        verification = runtime.Verification.InternalConsistency
        try:
            self._module = runtime._load_for_executorch(str(path), program_verification=verification)
        except RuntimeError as error:
            raise InputError("cannot load the program", where=str(path), why=str(error)) from error
        self.vocab = self._constant("get_vocab_size")
        self.context = self._constant("get_max_context_len")
        self.prefill = self._constant("get_max_seq_len")

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 [T, V] of a sequence from position 0 (see `Session`)."""
        return self.extend(ids, 0)

    def extend(self, ids: Tensor, position: int) -> Tensor:
        """Float32 [T, V] of tokens after `position` others (see `Session`)."""
        check_ids(self, self._path, ids, position)
        rows = [self._call(part, position + start * self.prefill) for start, part in enumerate(ids.split(self.prefill))]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def generate(self, ids: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
        """Greedy continuation (see `Session`)."""
        return greedy(self, ids, tokens, stop)

    def _call(self, ids: Tensor, position: int) -> Tensor:
        inputs = [ids.to(torch.long)[None], torch.tensor([position])]
        try:
            return self._module.forward(inputs)[0][0]
        except RuntimeError as error:
            raise InputError("the program does not run", where=str(self._path), why=str(error)) from error

    def _constant(self, name: str) -> Any:
        try:
            return int(self._module.run_method(name, [])[0])
        except RuntimeError as error:
            raise InputError("not a program of this package", where=str(self._path), why=f"no {name}") from error


def check_program_file(path: Path) -> None:
    """Raises InputError unless `path` begins like a program and is as long as its header says."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_SIZE)
        size = path.stat().st_size
    except OSError as error:
        raise InputError("no program", where=str(path), why=error.strerror or str(error)) from error
    check_program_header(head, size, str(path))


def check_program_header(head: bytes, size: int, where: str) -> None:
    """Raises InputError unless a file of `size` bytes that begins with `head` can be a whole program.

    The runtime aborts the process on some files that are no programs, so they must not reach it. Damage inside a file
    of the right length is not seen here; the manifest's sha256 is what finds it.
    """
    if len(head) < HEADER_SIZE or head[4:8] != IDENTIFIER or head[8:12] != HEADER_MAGIC:
        raise InputError("not an ExecuTorch program", where=where)
    _, program, segments_start, segments = struct.unpack("<IQQQ", head[12:HEADER_SIZE])
    expected = max(program, segments_start + segments)
    if size < expected:
        raise InputError("the program is truncated", where=where, why=f"{size} bytes of {expected}")
