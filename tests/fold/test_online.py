"""A Hadamard matrix in the graph: the same function, in all families, its cost counted, only where it has a kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.arch.decoder import block, family
from afq_export.arch.ops import FloatOps, block_hadamard, hadamard_matrix
from afq_export.errors import InputError
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.fold.forms import choose_forms
from afq_export.fold.online import online_config, online_costs, with_online
from afq_export.fold.rotation import rotate
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.model import open_model
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.recipe import Transforms
from afq_export.validate.fold_check import TOLERANCE, measure_fold
from tests.fold.test_identities import random_block
from tests.models import llama_config, opt_config, write_model

IDS = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1))
ONLINE = Transforms(online=("down_hadamard",))


@pytest.mark.parametrize("size", [2, 4, 64, 512])
def test_the_matrix_is_its_own_inverse(size: int) -> None:
    matrix = hadamard_matrix(size, torch.float64)
    assert torch.equal(matrix, matrix.T)
    assert float((matrix @ matrix - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-12
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(blocks=st.integers(1, 5), power=st.integers(1, 5), opt=st.booleans(), seed=st.integers(0, 99))
def test_the_block_is_the_same_function(blocks: int, power: int, opt: bool, seed: int) -> None:
    config = (opt_config if opt else llama_config)(intermediate=blocks << power)
    weights = random_block(config, seed)
    online = online_config(config, ONLINE)
    assert config.intermediate % online.down_hadamard == 0 and online.down_hadamard >= 2
    last = f"{family(config).WRITERS[-1]}.weight"
    turned = weights | {last: block_hadamard(weights[last], online.down_hadamard)}
    x = torch.randn(2, 5, config.hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain, other = block(config, FloatOps(config, weights), x), block(online, FloatOps(online, turned), x)
    assert float((plain - other).abs().max() / plain.abs().max()) < TOLERANCE
    forgotten = block(config, FloatOps(config, turned), x)  # the program without the operation
    assert float((plain - forgotten).abs().max() / plain.abs().max()) > 1e-3


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FloatCheckpoint:
    return open_model(str(write_model(tmp_path_factory.mktemp("model") / request.param, request.param)))


@pytest.mark.parametrize("rotation", ["off", "hadamard"])
def test_the_model_is_the_same_function(model: FloatCheckpoint, rotation: str) -> None:
    turned = rotate(with_online(model, ONLINE), rotation, 0)
    assert turned.config.down_hadamard
    assert measure_fold(model, FoldedCheckpoint(turned, lambda index: {}), IDS).passed


def test_nothing_folds_across_it(model: FloatCheckpoint) -> None:
    asked = Transforms(online=("down_hadamard",), up_to_down="diagonal")
    choices = {choice.site.name: choice for choice in choose_forms(online_config(model.config, asked), asked)}
    assert choices["up_to_down"].form is None and "Hadamard" in choices["up_to_down"].reason


def test_the_cost_is_counted() -> None:
    config = llama_config(intermediate=48)
    (cost,) = online_costs(online_config(config, ONLINE))
    linears = sum(o * i for o, i, _ in family(config).linear_shapes(config).values())
    assert (cost.size, cost.macs) == (16, 48 * 16 * config.layers)
    assert cost.share == pytest.approx(48 * 16 / linears)
    assert online_costs(config) == ()


def test_an_odd_width_has_none() -> None:
    with pytest.raises(InputError, match="odd number"):
        online_config(llama_config(intermediate=7), ONLINE)


def test_off_is_the_model_itself(model: FloatCheckpoint) -> None:
    assert with_online(model, Transforms()) is model


@pytest.mark.parametrize("target", ["intel-openvino", "android-vulkan", "ethos-u85"])
def test_other_targets_refuse_it_early(tmp_path: Path, target: str) -> None:
    config = llama_config()
    profile = load_target(target)
    recipe = load_recipe(profile.default_recipe, ('transforms.online=["down_hadamard"]',))
    with pytest.raises(InputError, match="online"):
        assign(config, recipe, profile)
