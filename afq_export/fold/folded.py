"""The fold stage: FloatCheckpoint and transforms -> FoldedCheckpoint, the same function with other weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.fold.rotation import RotatedCheckpoint
from afq_export.fold.sites import fold_block
from afq_export.fold.transform import SiteTransform
from afq_export.load.checkpoint import DecoderWeights


def basis(weights: DecoderWeights) -> Tensor | None:
    """What the residual stream of `weights` is multiplied by [D, D] (see fold/rotation.py), None when it is not."""
    inner = weights.original if isinstance(weights, FoldedCheckpoint) else weights
    return inner.basis if isinstance(inner, RotatedCheckpoint) else None


@dataclasses.dataclass(frozen=True)
class FoldedCheckpoint:
    """A DecoderWeights whose blocks are folded when read: in float64, cast once. Nothing is stored twice.

    `transforms(i)` gives block i's transforms by site name.
    """

    original: DecoderWeights
    transforms: Callable[[int], Mapping[str, SiteTransform]]

    @property
    def config(self) -> DecoderConfig:
        return self.original.config

    def embedding(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return self.original.embedding(dtype)

    def block(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        transforms = {name: t.to(torch.float64) for name, t in self.transforms(index).items()}
        sites = family(self.config).fold_sites(self.config)
        folded = fold_block(sites, transforms, self.original.block(index, torch.float64))
        return {name: folded.pop(name).to(dtype) for name in list(folded)}

    def head(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return self.original.head(dtype)
