"""Student's t against published quantiles."""

from __future__ import annotations

import math

import pytest

from afq_export.guard.student import LARGE, inside, quantile

PUBLISHED = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 29: 2.0452, 40: 2.0211,
             120: 1.9799}  # fmt: skip
"""Degrees of freedom -> the 97.5 % quantile, as printed in tables."""


@pytest.mark.parametrize(("df", "t"), PUBLISHED.items())
def test_published_quantiles(df: int, t: float) -> None:
    assert quantile(0.975, df) == pytest.approx(t, abs=6e-5)


def test_closed_forms() -> None:
    """One degree is Cauchy's distribution, two have a root."""
    for t in (0.1, 1.0, 7.0):
        assert inside(t, 1) == pytest.approx(2 / math.pi * math.atan(t), rel=1e-14)
        assert inside(t, 2) == pytest.approx(t / math.sqrt(2 + t * t), rel=1e-14)


def test_quantile_is_the_inverse_and_falls_to_the_normal_one() -> None:
    for df in (1, 2, 7, 38, 501):
        assert (1 + inside(quantile(0.9, df), df)) / 2 == pytest.approx(0.9, rel=1e-12)
    values = [quantile(0.975, df) for df in (1, 2, 5, 20, 100, LARGE - 1, LARGE, 10**9)]
    assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(1.959964, abs=1e-6)
