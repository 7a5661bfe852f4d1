"""A program that nothing here runs, read operation by operation, against the integer reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.arch import decoder
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec.report import Check
from afq_export.spec.target import TargetProfile
from afq_export.validate.rungs import integer_rung, run_block


@torch.no_grad()
def meaning_check(
    read: Callable[[Tensor], Tensor], checkpoint: QuantizedCheckpoint, target: TargetProfile, ids_T: Tensor
) -> Check:
    """`read` gives float32 logits [T, V] by the meaning of the file's operations; within the target's budget?"""
    theirs, ours = read(ids_T), _reference(checkpoint, target, ids_T)
    losses = [F.cross_entropy(logits[:-1].double(), ids_T[1:]) for logits in (theirs, ours)]
    excess = float((losses[0] - losses[1]).exp() - 1)
    same = float((theirs.argmax(-1) == ours.argmax(-1)).double().mean())
    error = float((theirs - ours).abs().max() / ours.abs().max())
    detail = (
        f"the file's operations, computed one by one as they are defined: perplexity {excess:+.3%} of the integer "
        f"reference (budget {target.perplexity_budget:.2%}), logits within {error:.1e}, "
        f"same token at {same:.1%} of {len(ids_T)}"
    )
    passed = abs(excess) <= target.perplexity_budget
    return Check(name="specification", status="passed" if passed else "failed", detail=detail)


def _reference(checkpoint: QuantizedCheckpoint, target: TargetProfile, ids_T: Tensor) -> Tensor:
    """Float32 logits [T, V] of the integer rung."""
    rung = integer_rung(checkpoint, target)
    x = rung.embed(ids_T[None])
    for index in range(checkpoint.config.layers):
        x = run_block(rung, rung.block(index), x)
    return decoder.head(rung.head(), x)[0]
