"""Learned rotations: orthogonal, the same function, less rounding noise than where they start, the same bytes again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.calibrate import rotation as stage
from afq_export.calibrate.result import Calibration, read_rotation, rotation_path, write_rotation
from afq_export.calibrate.rotation import _Turning, learn_rotation, linear_noise, rounding_noise
from afq_export.errors import InputError
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.fold.rotation import Rotation, absorb_gains, fixes_ones, random_rotation, rotate
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.model import open_model
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.quantize.grid import fake_quantize_weight, weight_scales
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.quant import Granularity, LinearSpec, QuantSpec
from afq_export.validate.fold_check import TOLERANCE, measure_fold
from tests.models import write_model

IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(5))
STEPS = 24


@pytest.fixture(scope="module", params=["llama", "llama-biased", "qwen2", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FloatCheckpoint:
    """Tied and untied, with grouped queries and without, with biases and without."""
    return open_model(str(write_model(tmp_path_factory.mktemp("model") / request.param, request.param)))


def records_of(model: FloatCheckpoint) -> dict[str, LinearRecord]:
    return dict(assign(model.config, load_recipe("w4a8-g32+rtn"), load_target("android-xnnpack")))


@pytest.fixture(scope="module")
def learned(model: FloatCheckpoint) -> Rotation:
    return learn_rotation(model, records_of(model), IDS, 0, STEPS, silent)


def identity_error(matrix: torch.Tensor) -> float:
    return float((matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=torch.float64)).abs().max())


def noise_of(model: FloatCheckpoint, rotation: Rotation) -> float:
    """Over all blocks, nothing sampled."""
    config, inputs, records = model.config, stage._inputs(model, IDS, silent), records_of(model)
    found = 0.0
    for index, seen in enumerate(inputs):
        weights = absorb_gains(config, model.block(index))
        of_block = {role: records[f"blocks.{index}.{role}"] for role in seen}
        turns = rotation.residual.float(), rotation.heads[index].float()
        found += float(rounding_noise(config, weights, seen, of_block, *turns))
    return found


def test_it_is_orthogonal_and_the_model_is_the_same_function(model: FloatCheckpoint, learned: Rotation) -> None:
    assert identity_error(learned.residual) < 1e-12
    assert identity_error(learned.heads) < 1e-12
    assert not torch.equal(learned.heads[0], learned.heads[1]), "each block's heads turn by themselves"
    check = measure_fold(model, FoldedCheckpoint(rotate(model, "learned", 0, learned), lambda index: {}), IDS[:2])
    assert check.passed and check.float64 < TOLERANCE


def test_it_makes_less_noise_than_its_start(model: FloatCheckpoint, learned: Rotation) -> None:
    assert noise_of(model, learned) < 0.98 * noise_of(model, random_rotation(model.config, 0))


def test_the_ones_stay_where_layernorm_needs_them(model: FloatCheckpoint, learned: Rotation) -> None:
    ones = torch.ones(model.config.hidden, dtype=torch.float64)
    assert torch.allclose(learned.residual @ ones, ones, atol=1e-12) == fixes_ones(model.config)


def test_it_is_the_same_bytes_again(model: FloatCheckpoint, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_rotation(folder, learn_rotation(model, records_of(model), IDS, 3, 2, silent))
    assert rotation_path(first).read_bytes() == rotation_path(second).read_bytes()
    kept = Calibration(first, model.config.layers).rotation()
    assert kept is not None and kept.residual.dtype is torch.float64


def test_a_broken_file_is_refused_and_none_is_none(tmp_path: Path) -> None:
    assert Calibration(tmp_path, 1).rotation() is None
    rotation_path(tmp_path).write_bytes(b"no")
    with pytest.raises(InputError, match="learned rotation"):
        read_rotation(tmp_path)


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    model = open_model(str(write_model(tmp_path / "llama", "llama")))

    class Loud(FloatCheckpoint):
        def block(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
            weights = super().block(index, dtype)
            return weights | {"v_proj.weight": weights["v_proj.weight"] * (1e30 if index == 1 else 0)}

    loud = Loud(model.config, model.source, model.name, model.digest)
    with pytest.raises(InputError, match=r"blocks\.1"):
        learn_rotation(loud, records_of(model), IDS, 0, 2, silent)


def test_nothing_learned_is_refused(model: FloatCheckpoint) -> None:
    with pytest.raises(InputError, match="no rotation yet"):
        rotate(model, "learned", 0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(size=st.integers(2, 40), seed=st.integers(0, 99), fixing=st.booleans())
def test_steps_leave_no_rounding_behind(size: int, seed: int, fixing: bool) -> None:
    """However large they are, and however many: what is orthogonal stays so, and the ones where they were."""
    generator = torch.Generator().manual_seed(seed)
    turning = _Turning(torch.eye(size, dtype=torch.float64), 0.3, fixing)
    for _ in range(30):
        turning.step(torch.randn(size, size, generator=generator), 1.0)
    assert identity_error(turning.matrix) < 1e-12
    moved = turning.matrix.sum(1) - 1
    assert float(moved.abs().max()) < 1e-12 or not fixing
    assert not torch.equal(turning.matrix, torch.eye(size, dtype=torch.float64)) or (fixing and size == 2)


@pytest.mark.parametrize("granularity, group", [(Granularity.PER_GROUP, 32), (Granularity.PER_CHANNEL, 0)])
def test_the_noise_is_what_rounding_to_nearest_adds(granularity: Granularity, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 128, generator=generator), torch.randn(512, 128, generator=generator)
    spec = QuantSpec(4, granularity, group=group)
    record = LinearRecord(LinearSpec("blocks.0.q_proj", 64, 128, False, spec, None), "any")
    scales = weight_scales(weight, torch.ones(64, spec.groups(128)), spec)
    real = (x @ (fake_quantize_weight(weight, scales, spec) - weight).T).square().mean()
    assert float(linear_noise(weight, x, record)) == pytest.approx(float(real), rel=0.05)
