"""Grids of named tensors (arch/static.py), where a target keeps every tensor of a program on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.ops import Weights
from afq_export.arch.static import INPUT_OF, Visit
from afq_export.quantize.activations import fake_quantize_static, range_grid
from afq_export.quantize.checkpoint import StaticRange
from afq_export.spec.target import TargetProfile

Grids = Mapping[str, StaticRange]
"""Name of a tensor -> its grid."""

OPERANDS = frozenset({*INPUT_OF.values(), "q_rotated", "k_rotated", "v_proj", "probabilities"})
"""What linears and matrix products take."""
UNIT = ("sigmoid", "probabilities")
TABLES = ("cos", "sin")
SCORES = ("scores", "masked")
CACHED = ("keys", "values")
CACHE_BITS = 8
"""The KV cache has 8 bits at most: it is the half of attention's products that NPUs take as weights."""


@dataclasses.dataclass(frozen=True)
class TensorBits:
    """Bits of every tensor's grid: of those that a linear or a matrix product takes (`operands`), and of the others.
    What the KV cache holds has 8 at most."""

    operands: int
    others: int

    def of(self, name: str) -> int:
        """Those of the tensor `name`."""
        if name in CACHED:
            return min(self.operands, CACHE_BITS)
        return self.operands if name in OPERANDS else self.others


def tensor_bits(activations: int, target: TargetProfile) -> TensorBits:
    """What the grids of a static graph have, where its activations have `activations` bits."""
    return TensorBits(activations, max(activations, target.elementwise_bits))


def cached_from(name: str, config: DecoderConfig) -> str:
    """The tensor that `keys` or `values` is made of."""
    return "v_proj" if name == "values" else "k_rotated" if config.rope else "k_proj"


def fixed_grid(name: str, config: DecoderConfig, bits: int) -> StaticRange | None:
    """The grid of a tensor whose range is known without looking, else None."""
    if name in UNIT:
        return StaticRange(2.0**-bits, -(1 << (bits - 1)), bits)
    if name in TABLES:
        largest = config.rope.attention_factor if config.rope else 1.0
        return StaticRange(float(torch.tensor(largest / ((1 << (bits - 1)) - 1), dtype=torch.float32)), 0, bits)
    return None


def visit_grids(grids: Grids) -> Visit:
    """The visit that rounds every tensor to its stored grid."""
    return lambda name, x: fake_quantize_static(x, grids[name])


def symmetric_grid(largest: float, bits: int) -> StaticRange:
    """The grid of [-largest, largest] with zero point 0."""
    scale = torch.tensor(largest / ((1 << (bits - 1)) - 1), dtype=torch.float32).clamp_min(2.0**-100)
    return StaticRange(float(scale), 0, bits)


def constant_grid(values: Tensor, bits: int) -> StaticRange:
    """The grid of a stored float tensor (a norm's weight): over its values and 0."""
    return range_grid(float(values.min()), float(values.max()), bits)


def on_constant_grids(floats: Weights, bits: int) -> dict[str, Tensor]:
    """Float tensors as a program without floats has them."""
    return {name: fake_quantize_static(values, constant_grid(values, bits)) for name, values in floats.items()}
