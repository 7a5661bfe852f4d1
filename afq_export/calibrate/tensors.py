"""Static grids for every tensor of a graph, not only for what the linears take: learned against, observed, stored.

For targets whose programs hold no float tensor at all (`TargetProfile.static_graph`): NPUs. Names are those of
arch/static.py. A grid is found as that of a linear's input is (ranges.py), with these exceptions:

    sigmoid, probabilities    [0, 1): the only grids that kernels have for them
    cos, sin                  symmetric, so that 0 and the largest value are codes
    scores, masked            one grid, whose low end stands for everything that the softmax makes 0
    keys, values              8 bits at most, symmetric: NPUs multiply 16 by 8 bits right with such weights only;
                              where what they are made of has no more bits, they are on its grid
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.ops import FloatOps, Weights
from afq_export.arch.static import INPUT_OF, MASKED, StaticOps, Visit
from afq_export.calibrate.observer import Method, Observer
from afq_export.calibrate.ops import Records
from afq_export.quantize.activations import fake_quantize_static, range_grid
from afq_export.quantize.checkpoint import StaticRange
from afq_export.quantize.tensors import CACHED, SCORES, Grids, TensorBits, cached_from, fixed_grid, symmetric_grid


class TensorGrids:
    """Visits every tensor of a block (`StaticOps.visit`): observes it, then rounds it to a grid over what this call
    shows of it. Gradients pass, so that transforms and clipping are learned with all of a block's tensors on grids."""

    def __init__(self, config: DecoderConfig, bits: TensorBits, *, observe: bool = False) -> None:
        self.config, self.bits, self.observing = config, bits, observe
        self.seen: dict[str, Observer] = {}
        self.fixed: dict[str, StaticRange] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        bits = self.bits.of(name)
        if name in CACHED and bits == self.bits.of(cached_from(name, self.config)):
            return x
        fixed = fixed_grid(name, self.config, bits)
        if fixed is not None:
            self.fixed[name] = fixed
            return fake_quantize_static(x, fixed)
        shown = _shown(name, x.detach(), self.config, bits)
        if self.observing:
            self.seen.setdefault("masked" if name in SCORES else name, Observer(bits)).see(shown)
        low, high = float(shown.min()), float(shown.max())
        grid = symmetric_grid(max(-low, high), bits) if name in CACHED else range_grid(low, high, bits)
        return fake_quantize_static(x, grid)

    def found(self, method: Method, weights: Weights) -> dict[str, StaticRange]:
        """The grids of all tensors that were seen. `weights`: the linears', for the method `output`."""
        elementwise: Method = "mse" if method == "output" else method
        grids = dict(self.fixed)
        for name, observer in self.seen.items():
            roles = [role for role, taken in INPUT_OF.items() if taken == name and f"{role}.weight" in weights]
            if name == "masked":
                grids |= dict.fromkeys(SCORES, observer.grid("minmax"))
            elif method == "output" and roles:
                grids[name] = observer.grid_for([weights[f"{role}.weight"] for role in roles])
            else:
                grids[name] = _symmetric(observer.grid(elementwise)) if name in CACHED else observer.grid(elementwise)
        for name in CACHED if "v_proj" in grids else ():
            grids.setdefault(name, grids[cached_from(name, self.config)])
        return grids


def _symmetric(grid: StaticRange) -> StaticRange:
    """The symmetric grid that covers `grid`."""
    ends = grid.qmax - grid.zero_point, grid.zero_point - grid.qmin
    return symmetric_grid(max(ends) * grid.scale, grid.bits)


def linear_ranges(grids: Grids, records: Records) -> dict[str, tuple[StaticRange, StaticRange | None]]:
    """(input, output) grids of the linears by role, out of those of all tensors."""
    return {role: (grids[INPUT_OF[role]], grids[role]) for role in records}


def static_ops(config: DecoderConfig, weights: Weights, visit: Visit) -> StaticOps:
    """A block with (fake-quantized) `weights` whose every result passes `visit`."""
    return StaticOps(config, FloatOps(config, weights), visit)


def _shown(name: str, x: Tensor, config: DecoderConfig, bits: int) -> Tensor:
    """What of a tensor counts for its grid, in rows as the linear that takes it has them."""
    if name in SCORES:
        return _attended_scores(x, bits)
    if name == "attended":
        return x.reshape(len(x), config.heads, -1, x.shape[-1]).transpose(1, 2).flatten(2)
    return x


def _attended_scores(scores: Tensor, bits: int) -> Tensor:
    """The ends of the range that the softmax needs, of scores [.., T, T] or [.., R * T, T].

    A score so far below its row's largest that its probability rounds to 0, even when all others are as low, may as
    well be the grid's lowest code: exp(-margin) = 2^-bits / tokens. What comes later than a token is not looked at.
    """
    tokens = scores.shape[-1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).triu(1)
    rows = scores.unflatten(-2, (-1, tokens)).masked_fill(later, MASKED)
    largest = rows.amax(-1)
    margin = math.log(2.0**bits * tokens)
    return torch.stack((largest.min() - margin, largest.max()))
