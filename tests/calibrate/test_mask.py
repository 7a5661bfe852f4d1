"""The gradual mask against the paper's definition, written out."""

from __future__ import annotations

import pytest

from afq_export.calibrate.mask import gradual_mask


@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize(("epoch", "epochs"), [(1, 10), (5, 10), (10, 10), (1, 1)])
def test_mask_is_the_papers(size: int, epoch: int, epochs: int) -> None:
    alpha = 0.25
    mask = gradual_mask(size, epoch / epochs, alpha)
    for i in range(size):
        for j in range(size):
            expected = 1.0 if i == j else alpha if abs(i - j) <= epoch / epochs * size else 0.0
            assert mask[i, j] == expected


def test_no_stability_factor_is_a_diagonal() -> None:
    assert gradual_mask(5, 1.0, 0.0).count_nonzero() == 5
