"""Operations that a recipe leaves in the program instead of folding them, and what they take."""

from __future__ import annotations

from typing import Literal

from afq_export.spec.strict import Data

Online = Literal["down_hadamard"]
"""What there is: Hadamard matrices before the MLP's last linear (fold/online.py)."""


class OnlineCost(Data):
    """`size` of its matrices, multiplications for one token in the whole program, and their `share` of those of a
    block's linears."""

    name: Online
    size: int
    macs: int
    share: float
