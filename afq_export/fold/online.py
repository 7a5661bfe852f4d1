"""What a recipe leaves in the graph on purpose: a block Hadamard matrix before the MLP's last linear, and the paper's
full matrix behind a norm.

`down_hadamard`. The last linear's input has the widest outliers of a block, and no rotation of the residual stream
reaches them: gate, product or ReLU stand in front (QuaRot, arXiv 2404.00456, section 4; SpinQuant's R4). So the program
multiplies by H, which is its own inverse, and the linear's columns take H once more: `x W^T = (x H) (W H)^T`. H is
block-diagonal, its blocks are Sylvester's matrices over the square root of their size.

`norm_matrix`. A dense matrix A does not fold into a norm's gain, so A^-1 stays behind the norm as a float product and
the linears that read it are quantized with A in them: `n(x) W^T = (n(x) A^-1) (W A^T)^T` (AffineQuant, arXiv
2403.12544, eq. 2; what its published code does with `use_ln_matrix`). A is learned like every other matrix
(calibrate/parameters.py); nothing is multiplied here, the fold writes A^-1 beside the norm's gain (sites.py).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.arch.ops import block_hadamard
from afq_export.errors import InputError
from afq_export.load.checkpoint import DecoderWeights
from afq_export.spec.online import NORM_MATRIX, OnlineCost
from afq_export.spec.recipe import Transforms


@dataclasses.dataclass(frozen=True)
class OnlineCheckpoint:
    """A DecoderWeights that meets its MLP's last linear through a Hadamard matrix: in float64, cast once."""

    original: DecoderWeights
    config: DecoderConfig

    def embedding(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return self.original.embedding(dtype)

    def block(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        weights = self.original.block(index, torch.float64)
        name = f"{family(self.config).WRITERS[-1]}.weight"
        weights[name] = block_hadamard(weights[name], self.config.down_hadamard)
        return {name: tensor.to(dtype) for name, tensor in weights.items()}

    def head(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return self.original.head(dtype)


def with_online(model: DecoderWeights, transforms: Transforms) -> DecoderWeights:
    """`model` as a program with the recipe's online operations has it; itself when there are none."""
    config = online_config(model.config, transforms)
    return OnlineCheckpoint(model, config) if config.down_hadamard else model


def online_config(config: DecoderConfig, transforms: Transforms) -> DecoderConfig:
    """The decoder with what `transforms.online` adds. Raises InputError when the width has no power of two in it."""
    if "down_hadamard" not in transforms.online:
        return config
    size = min(transforms.online_block, config.intermediate & -config.intermediate)
    if size == 1:
        raise InputError(
            "no Hadamard matrix before the last linear of the MLP",
            where="transforms.online",
            why=f"its {config.intermediate} inputs are an odd number, and blocks are powers of two",
            do="leave it out",
        )
    return dataclasses.replace(config, down_hadamard=size)


def online_costs(config: DecoderConfig, transforms: Transforms) -> tuple[OnlineCost, ...]:
    """What the online operations of a recipe take, counted in multiplications of a block for one token.

    The Hadamard matrix stands in a program once, those behind the norms are float32 and another for each of them.
    """
    linears = sum(outputs * inputs for outputs, inputs, _ in family(config).linear_shapes(config).values())
    size, width, found = online_config(config, transforms).down_hadamard, config.hidden, []
    if size:
        more = config.intermediate * size
        found.append(OnlineCost("down_hadamard", size, more * config.layers, more / linears, 4 * size**2))
    if NORM_MATRIX in transforms.online:
        more = len(family(config).NORMS) * width**2
        found.append(OnlineCost(NORM_MATRIX, width, more * config.layers, more / linears, 4 * more * config.layers))
    return tuple(found)
