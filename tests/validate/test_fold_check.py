"""A right fold passes at 1e-9, a wrong one fails and its block is named."""

from __future__ import annotations

import math

import pytest
import torch

from afq_export.errors import VerdictError
from afq_export.validate.fold_check import TOLERANCE, check_fold, measure_fold, relative_error
from tests.checkpoints import DequantizedWeights, random_checkpoint, random_windows, small_config


class Scaled(DequantizedWeights):
    """up -> down scaled per channel and back, in float64; `slip` leaves that much out of block 1's inverse."""

    def __init__(self, checkpoint, slip: float = 0.0) -> None:
        super().__init__(checkpoint)
        self.slip = slip

    def block(self, index, dtype=torch.float32):
        weights = super().block(index, torch.float64)
        random = torch.Generator().manual_seed(index)
        scale = torch.rand(self.config.intermediate, dtype=torch.float64, generator=random) * 3 + 0.1
        weights["up_proj.weight"] *= scale[:, None]
        weights["down_proj.weight"] /= scale * (1 + self.slip * (index == 1))
        return {name: tensor.to(dtype) for name, tensor in weights.items()}


@pytest.fixture
def checkpoint(tmp_path):
    return random_checkpoint(tmp_path / "quantized", small_config())


def test_a_fold_keeps_the_function(checkpoint):
    ids = random_windows(checkpoint.config).ids_NT
    check = check_fold(DequantizedWeights(checkpoint), Scaled(checkpoint), ids)
    assert 0 < check.float64 < 1e-13
    assert 1e-9 < check.float32 < 1e-4
    assert check.first_block is None


@pytest.mark.parametrize("slip", [1e-2, 1e-8])
def test_a_wrong_fold_is_named(checkpoint, slip):
    ids = random_windows(checkpoint.config).ids_NT
    check = measure_fold(DequantizedWeights(checkpoint), Scaled(checkpoint, slip), ids)
    assert check.first_block == "blocks.1"
    assert not check.passed
    with pytest.raises(VerdictError, match=r"blocks\.1"):
        check_fold(DequantizedWeights(checkpoint), Scaled(checkpoint, slip), ids)


@pytest.mark.parametrize("place", ["embedding", "head"])
def test_a_change_outside_the_blocks_is_named(checkpoint, place):
    class Changed(DequantizedWeights):
        def _scaled(self, tensors):
            return {name: tensor * 1.001 for name, tensor in tensors.items()}

        def embedding(self, dtype=torch.float32):
            return self._scaled(super().embedding(dtype)) if place == "embedding" else super().embedding(dtype)

        def head(self, dtype=torch.float32):
            return self._scaled(super().head(dtype)) if place == "head" else super().head(dtype)

    ids = random_windows(checkpoint.config).ids_NT
    assert measure_fold(DequantizedWeights(checkpoint), Changed(checkpoint), ids).first_block == place


def test_nan_is_no_agreement():
    bad = torch.tensor([1.0, math.nan], dtype=torch.float64)
    assert relative_error(torch.ones(2, dtype=torch.float64), bad) == math.inf > TOLERANCE
