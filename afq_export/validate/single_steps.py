"""Which choices of a program without float tensors hang on single steps of its grids.

Where hardware rounds an operator's result to another code than the integer reference does, and the target file allows
that, tokens are decided by it. Here the reference runs again with every code of every tensor moved at random, by a step
at most or as many as its operator may be off; a disagreement is explained when that moves the gap between the two
choices by as much as the gap is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec
import torch
from torch import Tensor

from afq_export.arch import decoder
from afq_export.arch.ops import Ops
from afq_export.arch.static import StaticOps, Visit
from afq_export.quantize.tensors import CACHED, TABLES, Grids
from afq_export.spec.report import Disagreement
from afq_export.validate.rungs import QuantizedRung, run_block

Steps = Mapping[str, int]
"""Name of a tensor -> the steps that it may be off; 1 for the others."""
ONE_STEP: Steps = MappingProxyType({})
RUNS = 8
MOVED = "every tensor"
"""What stands in a report where no single layer is at fault."""


@torch.no_grad()
def hang_on_steps(
    rung: QuantizedRung, ids_T: Tensor, places: Sequence[tuple[int, int, int]], steps: Steps = ONE_STEP
) -> list[bool]:
    """For each (position, choice, other choice): whether steps move their gap by as much as it is in `rung`."""
    first = _gaps(rung, None, ids_T, places)
    moved = [_gaps(rung, _Mover(seed, steps), ids_T, places) for seed in range(RUNS)]
    most = torch.stack([(gaps - first).abs() for gaps in moved]).amax(0)
    return (most >= first).tolist()


class _Mover:
    """Moves codes at random."""

    def __init__(self, seed: int, steps: Steps) -> None:
        self.generator, self.steps = torch.Generator().manual_seed(seed), steps

    def ops(self, ops: Ops, grids: Grids) -> Ops:
        """`ops` with every result moved."""
        if not isinstance(ops, StaticOps):
            return ops
        return StaticOps(ops.config, ops.inner, self._moving(ops.visit, grids), ops.parts)

    def _moving(self, visit: Visit, grids: Grids) -> Visit:
        def moved(name: str, x: Tensor) -> Tensor:
            y, most = visit(name, x), self.steps.get(name, 1)
            if name in CACHED or name in TABLES:
                return y
            return y + torch.randint(-most, most + 1, y.shape, generator=self.generator) * grids[name].scale

        return moved


def _gaps(rung: QuantizedRung, mover: _Mover | None, ids_T: Tensor, places: Sequence[tuple[int, int, int]]) -> Tensor:
    """Logit of the choice minus that of the other, float64, for each place."""

    def moved(ops: Ops, grids: Grids) -> Ops:
        return ops if mover is None else mover.ops(ops, grids)

    x = rung.embed(ids_T[None])
    for index in range(rung.config.layers):
        x = run_block(rung, moved(rung.block(index), rung.checkpoint.block_tensors(index)), x)
    logits = decoder.head(moved(rung.head(), rung.checkpoint.outer_tensors()), x)[0].double()
    return torch.stack([logits[at, one] - logits[at, other] for at, one, other in places])


def with_reasons(
    rung: QuantizedRung, ids_NT: Tensor, disagreements: Sequence[Disagreement], steps: Steps = ONE_STEP
) -> list[Disagreement]:
    """`disagreements`, those explained that hang on single steps."""
    found = list(disagreements)
    for window in sorted({item.window for item in found}):
        which = [at for at, item in enumerate(found) if item.window == window and item.reason == "unexplained"]
        places = [(found[at].position, found[at].reference, found[at].runtime) for at in which]
        for at, hangs in zip(which, hang_on_steps(rung, ids_NT[window], places, steps) if which else [], strict=True):
            if hangs:
                found[at] = msgspec.structs.replace(found[at], reason="flipped_step", layer=MOVED)
    return found
