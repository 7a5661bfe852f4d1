"""Folding must not change the function: float against folded, block by block, on real windows."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from afq_export.arch import decoder
from afq_export.errors import VerdictError
from afq_export.fold.folded import basis
from afq_export.load.checkpoint import DecoderWeights
from afq_export.progress import Progress, silent
from afq_export.validate.rungs import FloatRung, run_block

TOLERANCE = 1e-9
"""Largest allowed max |difference of logits| / max |logit| in float64."""


@dataclasses.dataclass(frozen=True)
class FoldCheck:
    """The relative errors of the logits by dtype, and where the hidden states first differ by more than TOLERANCE.

    `first_block`: `embedding`, `blocks.<i>` or `head`; None when nothing departs. Every fold site lies within a block,
    so the hidden states after a block are comparable.
    """

    float64: float
    float32: float
    first_block: str | None

    @property
    def passed(self) -> bool:
        return self.float64 <= TOLERANCE and self.first_block is None


def measure_fold(
    original: DecoderWeights, folded: DecoderWeights, ids_NT: Tensor, progress: Progress = silent
) -> FoldCheck:
    """Runs both models over `ids_NT` in float64 and in float32, one block of each in memory."""
    float64, first_block = _compare(original, folded, ids_NT, torch.float64, progress)
    float32, _ = _compare(original, folded, ids_NT, torch.float32, progress)
    return FoldCheck(float64, float32, first_block)


def check_fold(
    original: DecoderWeights, folded: DecoderWeights, ids_NT: Tensor, progress: Progress = silent
) -> FoldCheck:
    """`measure_fold`. Raises VerdictError naming the first block that departs."""
    check = measure_fold(original, folded, ids_NT, progress)
    if not check.passed:
        raise VerdictError(
            "folding changed the model",
            where=check.first_block or "logits",
            why=f"relative error {check.float64:.2e} in float64, allowed is {TOLERANCE:.0e}",
            do="report this: a transform was folded where its inverse was not",
        )
    return check


@torch.no_grad()
def _compare(
    original: DecoderWeights, folded: DecoderWeights, ids_NT: Tensor, dtype: torch.dtype, progress: Progress
) -> tuple[float, str | None]:
    """Relative error of the logits, and the first place whose output, in the folded model's basis, departs by more than
    TOLERANCE."""
    turn = basis(folded)

    def error(x: Tensor, y: Tensor) -> float:
        return relative_error(x if turn is None else x @ turn.to(x.dtype), y)

    config, label = original.config, f"fold check {str(dtype).removeprefix('torch.')}"
    rungs = (FloatRung(original, dtype), FloatRung(folded, dtype))
    states = [rung.embed(ids_NT) for rung in rungs]
    departed = None if error(*states) <= TOLERANCE else "embedding"
    for index in range(config.layers):
        progress(label, index, config.layers)
        states = [run_block(rung, rung.block(index), x) for rung, x in zip(rungs, states, strict=True)]
        if departed is None and not error(*states) <= TOLERANCE:
            departed = f"blocks.{index}"
    heads = [rung.head() for rung in rungs]
    errors = [
        relative_error(*(decoder.head(head, x[None]) for head, x in zip(heads, window, strict=True)))
        for window in zip(*states, strict=True)
    ]
    progress(label, config.layers, config.layers)
    worst = max(errors)
    return worst, departed or (None if worst <= TOLERANCE else "head")


def relative_error(reference: Tensor, other: Tensor) -> float:
    """max |difference| / max |reference|; infinite when anything is not finite."""
    error = float((other - reference).abs().max() / reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    return error if math.isfinite(error) else math.inf
