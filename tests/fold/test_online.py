"""Matrices in the graph, Hadamard's and those behind norms: the same function, in all families, their cost counted,
only where they have a kernel."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import block, family
from afq_export.arch.ops import FloatOps, block_hadamard, hadamard_matrix
from afq_export.errors import InputError
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.fold.forms import choose_forms
from afq_export.fold.online import online_config, online_costs, with_online
from afq_export.fold.rotation import rotate
from afq_export.fold.sites import fold_block
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.model import open_model
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.online import Online
from afq_export.spec.recipe import Transforms
from afq_export.spec.sites import FoldSite, Form, SiteKind
from afq_export.validate.fold_check import TOLERANCE, measure_fold
from tests.fold.test_identities import configs, difference, random_block, random_transform
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
    (cost,) = online_costs(config, ONLINE)
    linears = sum(o * i for o, i, _ in family(config).linear_shapes(config).values())
    assert (cost.size, cost.macs, cost.bytes) == (16, 48 * 16 * config.layers, 4 * 16 * 16)
    assert cost.share == pytest.approx(48 * 16 / linears)
    assert online_costs(config, Transforms()) == ()
    _, behind = online_costs(config, Transforms(online=("down_hadamard", "norm_matrix"), norm_to_linears="affine"))
    more = 2 * config.hidden**2
    assert (behind.size, behind.macs) == (config.hidden, more * config.layers)
    assert behind.share == pytest.approx(more / linears)
    assert behind.bytes == 4 * more * config.layers


def test_an_odd_width_has_none() -> None:
    with pytest.raises(InputError, match="odd number"):
        online_config(llama_config(intermediate=7), ONLINE)


def test_off_is_the_model_itself(model: FloatCheckpoint) -> None:
    assert with_online(model, Transforms()) is model


@pytest.mark.parametrize(
    ("target", "online"),
    [(target, online) for target in ("intel-openvino", "android-vulkan", "ethos-u85") for online in get_args(Online)]
    + [("android-xnnpack", "norm_matrix")],
)
def test_other_targets_refuse_it_early(target: str, online: str) -> None:
    profile = load_target(target)
    recipe = load_recipe(profile.default_recipe, (f'transforms.online=["{online}"]',))
    with pytest.raises(InputError, match=f"online = '{online}'.: only float programs of ONNX Runtime"):
        assign(llama_config(), recipe, profile)


def norm_sites(config: DecoderConfig) -> dict[str, FoldSite]:
    return {site.name: site for site in family(config).fold_sites(config) if site.kind is SiteKind.NORM_TO_LINEARS}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(config=configs(), shift=st.booleans(), seed=st.integers(0, 99))
def test_a_block_with_matrices_behind_its_norms_is_the_same_function(
    config: DecoderConfig, shift: bool, seed: int
) -> None:
    weights = random_block(config, seed)
    sites = norm_sites(config)
    transforms = {
        name: random_transform(site, Form.PER_HEAD, shift and site.shift, seed) for name, site in sites.items()
    }
    folded = fold_block(tuple(sites.values()), transforms, weights)
    assert {f"{name}.matrix" for name in sites} == folded.keys() - weights.keys()
    assert difference(config, weights, folded) < TOLERANCE
    forgotten = {name: tensor for name, tensor in folded.items() if not name.endswith(".matrix")}
    assert difference(config, weights, forgotten) > 1e-3


@pytest.mark.parametrize("rotation", ["off", "hadamard"])
def test_the_model_with_matrices_behind_its_norms_is_the_same_function(model: FloatCheckpoint, rotation: str) -> None:
    found = {name: random_transform(site, Form.PER_HEAD, False, 3) for name, site in norm_sites(model.config).items()}
    assert measure_fold(model, FoldedCheckpoint(rotate(model, rotation, 0), lambda index: found), IDS).passed


def test_a_matrix_behind_a_norm_is_chosen_where_it_is_asked_for_only() -> None:
    config, asked = llama_config(), Transforms(online=("norm_matrix",), norm_to_linears="affine")
    forms = {choice.site.name: choice.form for choice in choose_forms(config, asked)}
    assert {forms["attn_norm"], forms["mlp_norm"]} == {Form.PER_HEAD}
    with pytest.raises(InputError, match=r"does not fold .* let it stay: transforms.online = \['norm_matrix'\]"):
        choose_forms(config, Transforms(norm_to_linears="affine"))
    with pytest.raises(InputError, match="'diagonal' learns none; set"):
        choose_forms(config, Transforms(online=("norm_matrix",), norm_to_linears="diagonal"))


def test_nothing_learned_is_nothing_to_multiply_by() -> None:
    changes = ('transforms.online=["norm_matrix"]', "transforms.norm_to_linears=affine", "learning.epochs=0")
    with pytest.raises(InputError, match=r"learning\.epochs = 0"):
        assign(llama_config(), load_recipe("w4a4+affinequant", changes), load_target("linux-x64-ort"))
