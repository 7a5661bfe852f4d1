"""Every fold identity, over shapes, head counts, GQA ratios and biases: the folded block is the same function."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import block, family
from afq_export.arch.ops import FloatOps
from afq_export.fold.sites import fold_block, fold_site
from afq_export.fold.transform import SiteTransform, condition_number, dominance_margin
from afq_export.spec.sites import FoldSite, Form
from tests.models import llama_config, opt_config

TOLERANCE = 1e-9


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    """Llama-like and OPT-like configurations with any head size, GQA ratio and biases."""
    kv_heads, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    half = draw(st.integers(1, 4))
    heads, head_dim = kv_heads * repeats, 2 * half
    biases = {key: draw(st.booleans()) for key in ("qkv_bias", "out_bias", "mlp_bias")}
    intermediate = draw(st.integers(3, 20))
    if draw(st.booleans()):
        from afq_export.arch.config import Rope

        rope = Rope(tuple(10.0**-i for i in range(half)))
        hidden = draw(st.integers(4, 12))
        return llama_config(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            hidden=hidden,
            rope=rope,
            intermediate=intermediate,
            qk_norm=draw(st.booleans()),
            **biases,
        )
    return opt_config(
        heads=heads, kv_heads=heads, head_dim=head_dim, hidden=heads * head_dim, intermediate=intermediate, **biases
    )


def random_block(config: DecoderConfig, seed: int) -> dict[str, torch.Tensor]:
    """Random float64 weights of one block."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {}
    for role, (outputs, inputs, bias) in family(config).linear_shapes(config).items():
        weights[f"{role}.weight"] = randn(outputs, inputs) / inputs**0.5
        if bias:
            weights[f"{role}.bias"] = randn(outputs)
    for norm in ("attn_norm", "mlp_norm"):
        weights[f"{norm}.weight"] = 1 + 0.1 * randn(config.hidden)
        if config.family == "opt":
            weights[f"{norm}.bias"] = randn(config.hidden)
    if config.qk_norm:
        weights |= {f"{name}.weight": 1 + 0.1 * randn(config.head_dim) for name in ("q_norm", "k_norm")}
    return weights


def random_transform(site: FoldSite, form: Form, shift: bool, seed: int) -> SiteTransform:
    """A random well-conditioned transform of that form."""
    generator = torch.Generator().manual_seed(seed)
    d, heads = site.head_dim, site.heads
    shifts = torch.randn(site.dim, generator=generator, dtype=torch.float64) if shift else None
    if form is Form.PERMUTATION:
        order = torch.cat([torch.randperm(d, generator=generator) + head * d for head in range(heads)])
        return SiteTransform(form, order)
    diagonal = torch.rand(site.dim, generator=generator, dtype=torch.float64) + 0.5
    if form is Form.DIAGONAL:
        return SiteTransform(form, diagonal, shifts)
    if form is Form.PER_HEAD:
        mixed = torch.randn(heads, d, d, generator=generator, dtype=torch.float64) * 0.5 / d
        return SiteTransform(form, torch.diag_embed(diagonal.view(heads, d)) + mixed, shifts)
    angle = torch.rand(heads, d // 2, generator=generator, dtype=torch.float64) * 6
    scale = diagonal.view(heads, d)[:, : d // 2]
    cos, sin = torch.diag_embed(scale * angle.cos()), torch.diag_embed(scale * angle.sin())
    return SiteTransform(form, torch.cat((torch.cat((cos, -sin), -1), torch.cat((sin, cos), -1)), -2))


def difference(config: DecoderConfig, before: dict, after: dict, seed: int = 9) -> float:
    """Largest relative difference of the block's output in float64."""
    x = torch.randn(2, 7, config.hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y, z = block(config, FloatOps(config, before), x), block(config, FloatOps(config, after), x)
    return float((y - z).abs().max() / y.abs().max())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 1000))
def test_every_legal_fold_is_exact(config: DecoderConfig, seed: int) -> None:
    weights = random_block(config, seed)
    for site in family(config).fold_sites(config):
        for form in site.forms:
            for shift in {False, site.shift and form is not Form.PERMUTATION and site.name != "q_to_k"}:
                transform = random_transform(site, form, shift, seed + 1)
                folded = fold_site(site, transform, weights)
                assert difference(config, weights, folded) < TOLERANCE, (site.name, form, shift)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 1000))
def test_all_sites_together_are_exact(config: DecoderConfig, seed: int) -> None:
    sites = family(config).fold_sites(config)
    weights = random_block(config, seed)
    transforms = {s.name: random_transform(s, s.forms[-1], False, seed + 2) for s in sites if s.forms}
    folded = fold_block(sites, transforms, weights)
    assert difference(config, weights, folded) < TOLERANCE
    changed = [key for key in weights if not torch.equal(weights[key], folded[key])]
    assert "q_proj.weight" in changed or config.qk_norm


def test_a_dense_matrix_before_rope_is_not_the_same_function() -> None:
    """The published code's q/k transform: what our table refuses is really wrong, so the test above can fail."""
    config = llama_config()
    site = next(s for s in family(config).fold_sites(config) if s.name == "q_to_k")
    assert Form.PER_HEAD not in site.forms
    dense = random_transform(site, Form.PER_HEAD, False, 0)
    weights = random_block(config, 0)
    assert difference(config, weights, fold_site(site, dense, weights)) > 1e-3


def test_a_negative_diagonal_does_not_pass_relu() -> None:
    config = opt_config()
    site = next(s for s in family(config).fold_sites(config) if s.name == "up_to_down")
    assert site.positive
    weights = random_block(config, 0)
    flipped = SiteTransform(Form.DIAGONAL, -torch.ones(site.dim, dtype=torch.float64))
    assert difference(config, weights, fold_site(site, flipped, weights)) > 1e-3


def test_an_inverse_that_is_given_is_used() -> None:
    """Calibration passes the inverse with its graph; a wrong one must show."""
    config = llama_config()
    site = next(s for s in family(config).fold_sites(config) if s.name == "v_to_o")
    weights = random_block(config, 0)
    right = random_transform(site, Form.PER_HEAD, False, 0)
    assert difference(config, weights, fold_site(site, right, weights)) < TOLERANCE
    wrong = dataclasses.replace(right, inverse=torch.eye(site.head_dim, dtype=torch.float64).expand_as(right.matrix))
    assert difference(config, weights, fold_site(site, wrong, weights)) > 1e-3


@pytest.mark.parametrize("scale", [0.1, 0.9, 1.1])
def test_dominance_margin_is_zero_where_the_row_sum_meets_the_diagonal(scale: float) -> None:
    size = 4
    off = torch.full((size, size), scale / (size - 1), dtype=torch.float64).fill_diagonal_(1.0)
    transform = SiteTransform(Form.PER_HEAD, off[None])
    assert dominance_margin(transform) == pytest.approx(1 - scale)
    assert condition_number(transform) == pytest.approx(float(torch.linalg.cond(off)))
