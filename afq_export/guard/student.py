"""Student's t distribution for whole degrees of freedom, by its finite sums (Abramowitz and Stegun, 26.7.3, 26.7.4)."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

LARGE = 2000
"""Degrees of freedom from which the normal distribution serves: its quantile is off by less than 1e-3."""


def inside(t: float, df: int) -> float:
    """P(|T| < t) for `df` degrees of freedom."""
    theta = math.atan(t / math.sqrt(df))
    cos2 = math.cos(theta) ** 2
    odd = df % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= cos2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


@functools.cache
def quantile(p: float, df: int) -> float:
    """The t below which T falls with probability `p` > 0.5."""
    if df >= LARGE:
        return NormalDist().inv_cdf(p)
    low, high = 0.0, 1.0
    while (1 + inside(high, df)) / 2 < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + inside(middle, df)) / 2 < p else (low, middle)
    return high
