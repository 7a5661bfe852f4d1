"""Turning the residual stream and the heads: orthogonal matrices, the same function, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.arch.decoder import family
from afq_export.errors import InputError
from afq_export.fold.folded import FoldedCheckpoint, basis
from afq_export.fold.online import with_online
from afq_export.fold.rotation import RotatedCheckpoint, fixing_ones, hadamard, orthogonal, rotate
from afq_export.fold.transform import SiteTransform
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.model import open_model
from afq_export.spec.recipe import Transforms
from afq_export.spec.sites import Form
from afq_export.validate.fold_check import TOLERANCE, measure_fold
from tests.fold.test_identities import random_transform
from tests.models import write_model

IDS = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def identity_error(matrix: torch.Tensor) -> float:
    return float((matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).abs().max())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(size=st.integers(1, 80), seed=st.integers(0, 99))
def test_all_three_kinds_are_orthogonal(size: int, seed: int) -> None:
    for make in (hadamard, fixing_ones, orthogonal):
        matrix = make(size, generator(seed))
        assert matrix.shape == (size, size)
        assert identity_error(matrix) < 1e-12


@pytest.mark.parametrize("size", [2, 7, 24, 64])
def test_the_mean_survives_where_layernorm_needs_it(size: int) -> None:
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(fixing_ones(size, generator(0)) @ ones, ones, atol=1e-12)
    assert torch.allclose(ones @ fixing_ones(size, generator(0)), ones, atol=1e-12)


def test_a_power_of_two_gives_entries_of_one_size() -> None:
    assert torch.allclose(hadamard(64, generator(3)).abs(), torch.full((64, 64), 0.125, dtype=torch.float64))


def test_the_seed_decides() -> None:
    assert torch.equal(hadamard(24, generator(1)), hadamard(24, generator(1)))
    assert not torch.equal(hadamard(24, generator(1)), hadamard(24, generator(2)))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(size=st.integers(3, 40), seed=st.integers(0, 99))
def test_without_a_mean_layernorm_is_rmsnorm_and_any_rotation_of_the_rest_is_there(size: int, seed: int) -> None:
    """What `fixing_ones` can be: any orthogonal matrix of the D - 1 dimensions of a stream without mean, and no more.

    A matrix that takes the ones elsewhere leaves the function of RMSNorm alone and not that of LayerNorm.
    """
    x = torch.randn(5, size, generator=generator(seed), dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    rms = centred * centred.square().mean(-1, keepdim=True).rsqrt()
    norm = torch.nn.functional.layer_norm
    assert torch.allclose(norm(x, (size,), eps=0), rms, atol=1e-9)
    turned, free = fixing_ones(size, generator(seed)), orthogonal(size, generator(seed))
    assert torch.allclose(norm(centred @ turned, (size,), eps=0), rms @ turned, atol=1e-9)
    assert not torch.allclose(norm(centred @ free, (size,), eps=0), rms @ free, atol=1e-6)
    # An orthonormal basis of what has no mean: every orthogonal matrix in it fixes the ones once it is written out.
    basis = torch.linalg.svd(torch.eye(size, dtype=torch.float64) - 1 / size)[0][:, : size - 1]
    inner = orthogonal(size - 1, generator(seed + 1))
    outer = basis @ inner @ basis.T + 1 / size
    assert identity_error(outer) < 1e-12
    assert torch.allclose(outer.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-12)
    assert identity_error(basis.T @ turned @ basis) < 1e-12


@pytest.fixture(scope="module", params=["llama", "llama-biased", "qwen2", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FloatCheckpoint:
    return open_model(str(write_model(tmp_path_factory.mktemp("model") / request.param, request.param)))


def test_the_rotated_model_is_the_same_function(model: FloatCheckpoint) -> None:
    turned = rotate(model, "hadamard", 0)
    check = measure_fold(model, FoldedCheckpoint(turned, lambda index: {}), IDS)
    assert check.passed and check.float64 < TOLERANCE
    assert check.first_block is None
    assert not turned.config.tied


def test_every_weight_that_meets_the_stream_changed_and_gains_are_ones(model: FloatCheckpoint) -> None:
    turned, plain = rotate(model, "hadamard", 0).block(0), model.block(0)
    for role in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert not torch.allclose(turned[f"{role}.weight"], plain[f"{role}.weight"])
    assert torch.equal(turned["attn_norm.weight"], torch.ones_like(plain["attn_norm.weight"]))


def test_a_fault_in_one_rotated_weight_is_found_in_its_block(model: FloatCheckpoint) -> None:
    """The identity is held by comparison, not by construction: one head of o that is not turned is seen."""

    class Faulty(RotatedCheckpoint):
        def block(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
            weights = super().block(index, dtype)
            return weights | ({"o_proj.weight": weights["o_proj.weight"].flip(0)} if index == 1 else {})

    turned = rotate(model, "hadamard", 0)
    assert isinstance(turned, RotatedCheckpoint)
    faulty = Faulty(turned.original, turned.rotation)
    check = measure_fold(model, FoldedCheckpoint(faulty, lambda index: {}), IDS)
    assert check.first_block == "blocks.1"


@pytest.mark.parametrize("online", [(), ("down_hadamard",)])
def test_it_combines_with_a_transform_at_every_site(model: FloatCheckpoint, online: tuple) -> None:
    turned = rotate(with_online(model, Transforms(online=online)), "hadamard", 0)
    sites = [site for site in family(turned.config).fold_sites(turned.config) if site.forms]
    assert ("up_to_down" in {site.name for site in sites}) == (not online)

    def transforms(index: int) -> dict[str, SiteTransform]:
        widest = {s.name: Form.PER_HEAD if Form.PER_HEAD in s.forms else s.forms[0] for s in sites}
        shifts = {s.name: s.shift for s in sites}
        return {s.name: random_transform(s, widest[s.name], shifts[s.name], index) for s in sites}

    assert measure_fold(model, FoldedCheckpoint(turned, transforms), IDS).passed


def test_the_stream_of_a_layernorm_model_has_no_mean(model: FloatCheckpoint) -> None:
    turned = rotate(model, "hadamard", 0)
    if model.config.family == "opt":
        for tensor in turned.embedding(torch.float64).values():
            assert float(tensor.mean(1).abs().max()) < 1e-12 * float(tensor.abs().max())
        weights = turned.block(0, torch.float64)
        for key in ("o_proj.weight", "fc2.weight", "o_proj.bias", "fc2.bias"):
            assert float(weights[key].mean(0).abs().max()) < 1e-12


def test_off_is_the_model_itself(model: FloatCheckpoint) -> None:
    assert rotate(model, "off", 0) is model
    assert basis(FoldedCheckpoint(model, lambda index: {})) is None


def test_a_gain_of_zero_with_a_bias_is_refused(tmp_path: Path) -> None:
    model = open_model(str(write_model(tmp_path / "opt", "opt")))

    class Dead(FloatCheckpoint):
        def head(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
            weights = super().head(dtype)
            return weights | {"final_norm.weight": torch.zeros_like(weights["final_norm.weight"])}

    dead = Dead(model.config, model.source, model.name, model.digest)
    with pytest.raises(InputError, match="gain of 0"):
        rotate(dead, "hadamard", 0).head()
