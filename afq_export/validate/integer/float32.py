"""Fused multiply-add in float32, which torch and numpy do not have, emulated exactly in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_DROPPED_BITS = 52 - 23
"""Mantissa bits that a float64 has and a float32 has not."""
_DROPPED = (1 << _DROPPED_BITS) - 1
_MIDPOINT = 1 << (_DROPPED_BITS - 1)
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 `a * b + c` (broadcast), rounded once, as the hardware instruction does it.

    The float64 product of two float32 is exact (24 + 24 bits <= 53). Its float64 sum with `c` may be rounded, and
    rounding that again to float32 differs from rounding once only if the float64 sum lies exactly between two
    float32 (round to nearest is monotone, and each such midpoint is itself a float64). Those sums, and the ones below
    the normal float32, are rounded to odd first, after which the second rounding is right (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008, theorem 3).
    """
    product = a.double() * b.double()
    total = product + c
    result = total.float()
    doubtful = (total.view(torch.int64) & _DROPPED) == _MIDPOINT
    doubtful |= (total.abs() < _SMALLEST_NORMAL) & (total != 0)
    if bool(doubtful.any()):
        result[doubtful] = _rounded_once(product[doubtful], c.double().expand_as(total)[doubtful])
    return result


def _rounded_once(product: Tensor, c: Tensor) -> Tensor:
    """float32 of the exact sum of two float64: round to odd in float64, then to nearest."""
    total = product + c
    # Knuth's TwoSum: `error` is exactly what the float64 sum lost.
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = (total.view(torch.int64) & 1) == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype)
    return torch.where((error != 0) & even, torch.nextafter(total, towards), total).float()
