"""FloatCheckpoint: a decoder's weights, read block by block from wherever they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.errors import InputError
from afq_export.spec.report import UNKNOWN, Origin


class TensorSource(Protocol):
    """A file or folder of named tensors, read one at a time. Keys are Hugging Face names."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor there is, without reading any."""

    def read(self, key: str) -> Tensor:
        """The tensor, in the dtype it is stored in (dequantized when the file is quantized)."""


class DecoderWeights(Protocol):
    """What every rung reads weights through: one block at a time, our tensor names, one dtype."""

    @property
    def config(self) -> DecoderConfig: ...

    def embedding(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """`embed_tokens.weight` [V, D] and what else stands before the blocks."""

    def block(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Tensors of block `index` by role, e.g. `q_proj.weight` [O, I]."""

    def head(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """`final_norm.weight`, `lm_head.weight` [V, D]."""


@dataclasses.dataclass(frozen=True)
class FloatCheckpoint:
    """The model as it came. `digest` is the sha256 of its weights, `name` what the user called it.

    `files` is the folder that has tokenizer and generation config, `gguf` the file when it is one. Tensors are checked
    when read: a NaN or an infinity is an InputError.
    """

    config: DecoderConfig
    source: TensorSource
    name: str
    digest: str
    files: Path | None = None
    gguf: Path | None = None
    origin: Origin = UNKNOWN

    def embedding(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return self._read(family(self.config).embedding_names(self.config), dtype)

    def block(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return self._read(family(self.config).block_names(self.config, index), dtype)

    def head(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return self._read(family(self.config).head_names(self.config), dtype)

    def _read(self, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
        return {ours: self._checked(key, dtype) for ours, key in names.items()}

    def _checked(self, key: str, dtype: torch.dtype) -> Tensor:
        tensor = self.source.read(key).to(dtype)
        # A sum is finite only if all its terms are; it is a tenth of the work, and no second tensor.
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                "a weight is not finite",
                where=f"{self.name}: {key}",
                why=f"{bad} of {tensor.numel()} values are NaN or infinite",
                do="repair or download the checkpoint again",
            )
        return tensor
