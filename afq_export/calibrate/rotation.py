"""Rotations that are learned, before any block is: they make the rounding of all linears' weights and inputs small.

As in SpinQuant (arXiv 2405.16406) the matrices stay orthogonal while they move: each step is a Cayley transform of a
skew-symmetric matrix, `R <- R (I - S/2)^-1 (I + S/2)`. Its loss is the model's own, a backward pass through everything
for each step; ours is what rounding is expected to add to the linears' outputs, so that a step needs one block's
weights and a few rows of its inputs:

    weights   sum over groups of  step^2 / 12 * energy of the group's inputs       step = largest |w'| / qmax
    inputs    step^2 / 12 * |w'|^2                                                 step of the token's own range

relative to the energy of the linear's output, averaged over the linears; both move with the rotation, since the steps
follow the largest values. GPTQ and learned rounding start from the same grids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import block, embed, family
from afq_export.calibrate.statistics import CapturingOps
from afq_export.errors import InputError
from afq_export.fold.rotation import Rotation, absorb_gains, fixes_ones, random_rotation, turn_block, written_basis
from afq_export.load.checkpoint import DecoderWeights
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.quantize.grid import grouped
from afq_export.spec.quant import QuantSpec, linear_name
from afq_export.spec.sites import SiteKind

Weights = Mapping[str, Tensor]
WINDOWS = 8
"""Calibration windows of the float pass."""
ROWS = 256
"""Rows of every linear's input that are kept."""
SAMPLED = 512
"""Output features of a linear that a step looks at."""
RATE, HEAD_RATE = 0.05, 0.1
"""Angles of the first step in each plane of two axes, in radians times the square root of the size, of which the angle
of all planes together is a few times that; they fall to 0. Heads turn faster: each has only its block's steps."""
DECAYS = 0.9, 0.95
"""Of the averages of the gradient and of its square (Adam, arXiv 1412.6980)."""


def learn_rotation(
    model: DecoderWeights,
    records: Mapping[str, LinearRecord],
    ids_NT: Tensor,
    seed: int,
    steps: int,
    progress: Progress,
) -> Rotation:
    """Rotations after `steps` steps from random Hadamard ones, each on one block, all blocks in turn.

    Reads a block's weights at each step. Memory: ROWS rows of every linear's input, of all blocks. Raises InputError
    when a number is not finite.
    """
    config = model.config
    inputs = _inputs(model, ids_NT, progress)
    start = random_rotation(config, seed)
    residual = _Turning(start.residual, RATE, fixes_ones(config))
    heads = [_Turning(head, HEAD_RATE) for head in start.heads]
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        progress("calibrate: rotation, step", step, steps)
        order = order or torch.randperm(config.layers, generator=generator).tolist()
        index = order.pop()
        weights = absorb_gains(config, model.block(index))
        of_block = {role: records[linear_name(index, role)] for role in inputs[index]}
        moving = (residual, heads[index])
        turns = [turning.matrix.float().requires_grad_() for turning in moving]
        noise = rounding_noise(config, weights, inputs[index], of_block, turns[0], turns[1], generator)
        if not bool(noise.isfinite()):
            raise InputError(
                "no rotation can be learned",
                where=f"blocks.{index}",
                why="the noise of its rounding is not finite: inputs or weights are too large for float32",
                do="take transforms.rotation = 'hadamard'",
            )
        for turning, gradient in zip(moving, torch.autograd.grad(noise, turns), strict=True):
            turning.step(gradient, 1 - step / steps)
    return Rotation(residual.matrix, torch.stack([head.matrix for head in heads]))


def step_operations(config: DecoderConfig) -> int:
    """Operations of a step: a linear's output, sampled weights turned there and back, one solution in float64."""
    shapes = family(config).linear_shapes(config).values()
    outputs = 2 * ROWS * sum(rows * columns for rows, columns, _ in shapes)
    turned = 6 * len(shapes) * min(SAMPLED, config.hidden) * config.hidden**2
    return outputs + turned + 16 * config.hidden**3


def rounding_noise(
    config: DecoderConfig,
    weights: Weights,
    inputs: Weights,
    records: Mapping[str, LinearRecord],
    residual: Tensor,
    head: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Expected squared error of a block's linears over the energy of their outputs, averaged over them.

    `weights` without gains, `inputs` [S, I] by role in the basis of the model. With a `generator`, of SAMPLED output
    features of each linear, but all of v's, whose rows the head's rotation mixes.
    """
    arch, sampled, written = family(config), dict(weights), written_basis(config, residual)
    if generator is not None:
        for role in records:
            if role not in (*arch.WRITERS, "v_proj"):
                sampled[f"{role}.weight"] = weights[f"{role}.weight"][_some(len(weights[f"{role}.weight"]), generator)]
        written = written[:, _some(len(residual), generator)]
    turned = turn_block(config, sampled, residual, head, written)
    reading = {role for site in arch.fold_sites(config) if site.kind is SiteKind.NORM_TO_LINEARS
               for role in site.consumers}  # fmt: skip
    total = residual.new_zeros(())
    for role, record in records.items():
        x = inputs[role]
        energy = (x @ weights[f"{role}.weight"].T).square().mean().clamp_min(1e-30)
        if role in reading:
            x = x @ residual
        elif role == "o_proj":
            x = (x.view(len(x), -1, len(head)) @ head).reshape(x.shape)
        total = total + linear_noise(turned[f"{role}.weight"], x, record) / energy
    return total / len(records)


def linear_noise(weight_OI: Tensor, x_SI: Tensor, record: LinearRecord) -> Tensor:
    """Mean squared error of the outputs when every rounding error is uniform within its step, and by itself."""
    spec, activation = record.spec.weight, record.spec.activation
    steps_OG = grouped(weight_OI, spec).abs().amax(-1) / spec.qmax
    energy_IG = grouped(x_SI.square().mean(0)[None], spec).sum(-1)
    noise = (steps_OG.square() * energy_IG).sum(-1).mean()
    if activation is not None:
        norms_G = grouped(weight_OI, activation).square().sum(-1).mean(0)
        noise = noise + (_input_steps(x_SI, activation).square().mean(0) * norms_G).sum()
    return noise / 12


def _input_steps(x_SI: Tensor, spec: QuantSpec) -> Tensor:
    """Steps of the inputs' grids [S, G], or [1, 1] where one static grid holds all."""
    values = grouped(x_SI, spec) if spec.dynamic else x_SI.reshape(1, 1, -1)
    if spec.symmetric:
        return values.abs().amax(-1) / spec.qmax
    return (values.amax(-1).clamp(min=0) - values.amin(-1).clamp(max=0)) / (spec.qmax - spec.qmin)


def _some(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:SAMPLED]


@torch.no_grad()
def _inputs(model: DecoderWeights, ids_NT: Tensor, progress: Progress) -> list[dict[str, Tensor]]:
    """ROWS rows [S, I] of the input of every linear of every block without gains, in the float model."""
    config = model.config
    ids = ids_NT[torch.arange(min(WINDOWS, len(ids_NT))) * len(ids_NT) // min(WINDOWS, len(ids_NT))]
    x, found = embed(config, model.embedding(), ids), []
    for index in range(config.layers):
        progress("calibrate: rotation, block", index, config.layers)
        ops = CapturingOps(config, absorb_gains(config, model.block(index)))
        x = block(config, ops, x)
        kept: dict[int, Tensor] = {}
        for seen in ops.inputs.values():
            rows = seen.reshape(-1, seen.shape[-1])
            kept.setdefault(id(seen), rows[:: max(1, len(rows) // ROWS)][:ROWS].clone())
        found.append({role: kept[id(seen)] for role, seen in ops.inputs.items()})
    return found


@dataclasses.dataclass
class _Turning:
    """An orthogonal matrix that moves, and the averages of its gradients, which are skew-symmetric."""

    matrix: Tensor
    rate: float
    fixes_ones: bool = False

    def __post_init__(self) -> None:
        self.mean, self.square, self.count = torch.zeros_like(self.matrix), torch.zeros_like(self.matrix), 0

    def step(self, gradient: Tensor, factor: float) -> None:
        """Adam's step in the planes of two axes, as an exact rotation."""
        along = self.matrix.T @ gradient.double()
        along, (fast, slow) = along - along.T, DECAYS
        self.count += 1
        self.mean = fast * self.mean + (1 - fast) * along
        self.square = slow * self.square + (1 - slow) * along.square()
        size = (self.square / (1 - slow**self.count)).sqrt() + 1e-12
        skew = -factor * self.rate / len(along) ** 0.5 * self.mean / (1 - fast**self.count) / size
        if self.fixes_ones:  # what is skew and takes ones to 0 turns around the ones
            skew = skew - skew.mean(0, keepdim=True)
            skew = skew - skew.mean(1, keepdim=True)
        half = skew / 2
        one = torch.eye(len(skew), dtype=skew.dtype)
        self.matrix = self.matrix @ torch.linalg.solve(one - half, one + half)
