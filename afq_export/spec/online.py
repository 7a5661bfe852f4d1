"""Operations that a recipe leaves in the program instead of folding them, and what they take."""

from __future__ import annotations

from typing import Literal

from afq_export.spec.strict import Data

Online = Literal["down_hadamard", "norm_matrix"]
"""What there is: Hadamard matrices before the MLP's last linear, learned ones behind the norms (fold/online.py)."""

NORM_MATRIX: Online = "norm_matrix"

MATRIX_KIND = "matrix"
"""The kind of a norm's tensor [D, D] that its result is multiplied by, beside `weight` and `bias`."""


class OnlineCost(Data):
    """`size` of its matrices, multiplications for one token in the whole program, their `share` of those of the blocks'
    linears, and the `bytes` of the matrices in the program."""

    name: Online
    size: int
    macs: int
    share: float
    bytes: int = 0
