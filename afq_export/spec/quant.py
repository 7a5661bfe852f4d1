"""How a tensor is put on an integer grid, and which linear layers there are.

Shapes: O output features, I input features, G groups along I (1 when per channel).
"""

from __future__ import annotations

import enum
from typing import Literal

from afq_export.spec.strict import Data


class Granularity(enum.Enum):
    """What shares one scale."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_GROUP = "per_group"
    PER_TOKEN = "per_token"


class ScaleType(enum.Enum):
    """What the kernel stores scales in; scales are rounded to it *before* the integers are computed. `steps`: a group's
    scale is a whole multiple of one float per output (Qualcomm's LPBQ)."""

    STEPS = "steps"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class QuantSpec(Data):
    """A uniform grid: `x ~ scale * (code - zero_point)`, code in [qmin, qmax].

    `group` is the number of input features that share a scale (PER_GROUP only, else 0). `dynamic`: scale and zero
    point are computed by the kernel from the tensor itself at run time (activations only).
    """

    bits: int
    granularity: Granularity
    symmetric: bool = True
    group: int = 0
    dynamic: bool = False
    scale_type: ScaleType = ScaleType.FLOAT32

    @property
    def qmin(self) -> int:
        """Smallest code: -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code: 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, inputs: int) -> int:
        """G for a weight with `inputs` input features."""
        return -(-inputs // self.group) if self.granularity is Granularity.PER_GROUP else 1

    def __str__(self) -> str:
        where = f"g{self.group}" if self.granularity is Granularity.PER_GROUP else self.granularity.value
        return f"int{self.bits} {where}{' dynamic' if self.dynamic else ''}"


class LinearSpec(Data):
    """One linear layer `y[.., O] = x[.., I] W[O, I]^T + b` and the grids of its weight and its input.

    `name` is `blocks.<i>.<role>` or `lm_head`. `activation` None means that the input stays float.
    A static `activation` (not dynamic) means an input quantized per tensor with a stored range. `output` says whether
    the result is left on a stored grid as well: `any` as long as no kernel is chosen.
    """

    name: str
    outputs: int
    inputs: int
    bias: bool
    weight: QuantSpec
    activation: QuantSpec | None
    output: Literal["any", "float", "static"] = "any"

    @property
    def block(self) -> int | None:
        """Index of the block, None for lm_head."""
        return int(self.name.split(".")[1]) if self.name.startswith("blocks.") else None

    @property
    def role(self) -> str:
        """Last part of the name: `q_proj`, `down_proj`, `lm_head`, ..."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def groups(self) -> int:
        """G, the number of scales per output row."""
        return self.weight.groups(self.inputs)


def linear_name(block: int, role: str) -> str:
    """The one spelling of a block linear's name."""
    return f"blocks.{block}.{role}"
