"""Real factors as TOSA's RESCALE takes them."""

from __future__ import annotations

import numpy as np

LEAST_SHIFT, MOST_SHIFT = 2, 62


def multiplier_shift(factors: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """int32 multipliers and int8 shifts, `factor ~ multiplier * 2^-shift` to 31 significant bits (TOSA 1.0, RESCALE).

    Factors are at least 0 and below 2^29. One below 2^-32 loses bits, one that is 0 has multiplier 0.
    """
    factors = np.atleast_1d(np.asarray(factors, np.float64))
    assert (factors >= 0).all() and (factors < 2.0**29).all(), factors
    _, exponent = np.frexp(factors)
    shift = np.clip(31 - exponent, LEAST_SHIFT, MOST_SHIFT)
    multiplier = np.rint(np.ldexp(factors, shift)).astype(np.int64)
    full = multiplier == 1 << 31  # a mantissa that rounds up to 1
    return np.where(full, 1 << 30, multiplier).astype(np.int32), np.where(full, shift - 1, shift).astype(np.int8)
