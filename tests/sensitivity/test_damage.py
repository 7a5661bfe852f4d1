"""Damages against losses that are known exactly: expectations are taken over every outcome, not sampled."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from afq_export.quantize.assign import assign
from afq_export.quantize.quantize import quantize_linear
from afq_export.sensitivity.damage import input_damage, logit_damage, rounding_error, row_damage, weight_damage
from afq_export.spec.catalog import load_recipe, load_target
from tests.models import llama_config

TOKENS, INPUTS, OUTPUTS, VOCAB = 3, 4, 2, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(count: int) -> list[Tensor]:
    return [torch.tensor(s, dtype=torch.float64) for s in product((-1.0, 1.0), repeat=count)]


def test_of_a_linear_net_with_a_quadratic_loss_it_is_the_loss() -> None:
    """`1/2 sum (a w x - target)^2` at its minimum; the model's own targets lie 1 above and 1 below its output."""
    x_TI, weight_1I, error_1I, factor = (
        random(TOKENS, INPUTS),
        random(1, INPUTS, seed=1),
        random(1, INPUTS, seed=2),
        1.7,
    )
    target_T1 = factor * x_TI @ weight_1I.T
    loss = 0.5 * (factor * x_TI @ (weight_1I + error_1I).T - target_T1).square().sum()
    damages = [weight_damage((factor * sign_T[:, None] * x_TI).sum(0)[None], error_1I) for sign_T in signs(TOKENS)]
    assert sum(damages) / len(damages) == pytest.approx(float(loss), rel=1e-12)


@pytest.mark.parametrize("rows", [(0,), (1,), (0, 1)])
def test_of_a_linear_net_with_predictions_it_is_the_second_derivative_of_the_divergence(rows: tuple[int, ...]) -> None:
    """logits = A W x. Of several rows: the sum of what each does alone."""
    x_TI, weight_OI, out_VO = random(TOKENS, INPUTS), random(OUTPUTS, INPUTS, seed=1), random(VOCAB, OUTPUTS, seed=2)
    mask_O1 = torch.tensor([[float(row in rows)] for row in range(OUTPUTS)], dtype=torch.float64)
    error_OI = random(OUTPUTS, INPUTS, seed=3) * mask_O1
    p_TV = (x_TI @ weight_OI.T @ out_VO.T).softmax(-1)
    expected = 0.0
    for labels in product(range(VOCAB), repeat=TOKENS):
        chance = float(torch.stack([p_TV[token, label] for token, label in enumerate(labels)]).prod())
        gradient_TV = p_TV - torch.eye(VOCAB, dtype=torch.float64)[list(labels)]
        expected += chance * weight_damage((gradient_TV @ out_VO).T @ x_TI, error_OI)

    def divergence(only: int) -> Callable[[Tensor], Tensor]:
        row_OI = error_OI * (torch.arange(OUTPUTS) == only)[:, None]
        return lambda step: kl(p_TV, x_TI @ (weight_OI + step * row_OI).T @ out_VO.T)

    assert expected == pytest.approx(sum(half_second_derivative(divergence(row)) for row in rows), rel=1e-10)


def test_of_logits_it_is_the_second_derivative_of_the_divergence() -> None:
    logits_TV, error_TV = random(TOKENS, VOCAB), random(TOKENS, VOCAB, seed=1)
    p_TV = logits_TV.softmax(-1)
    exact = half_second_derivative(lambda step: kl(p_TV, logits_TV + step * error_TV))
    assert logit_damage(p_TV, error_TV) == pytest.approx(exact, rel=1e-10)
    assert logit_damage(p_TV, torch.full_like(error_TV, 3.0)) == pytest.approx(0, abs=1e-24)


def test_products_between_rows_vanish_over_all_signs() -> None:
    gradient_OI, error_OI = random(3, INPUTS), random(3, INPUTS, seed=1)
    whole = [0.5 * float((gradient_OI * error_OI * sign_O[:, None]).sum() ** 2) for sign_O in signs(3)]
    assert weight_damage(gradient_OI, error_OI) == pytest.approx(sum(whole) / len(whole), rel=1e-12)


def test_products_between_values_of_an_input_vanish_over_all_signs() -> None:
    gradient_TI, error_TI = random(2, 3), random(2, 3, seed=1)
    whole = [0.5 * float((gradient_TI * error_TI * sign.view(2, 3)).sum() ** 2) for sign in signs(6)]
    assert input_damage(gradient_TI, error_TI) == pytest.approx(sum(whole) / len(whole), rel=1e-12)


def test_a_token_row_counts_with_all_its_places() -> None:
    ids_T, gradient_TD, error_VD = torch.tensor([4, 1, 4, 0]), random(4, 5).float(), random(6, 5, seed=1).float()
    dense_VD = torch.zeros(6, 5)
    for token, gradient_D in zip(ids_T, gradient_TD, strict=True):
        dense_VD[token] += gradient_D
    assert row_damage(ids_T, gradient_TD, error_VD) == pytest.approx(weight_damage(dense_VD, error_VD), rel=1e-6)


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w4a8-g32", "w4a8"])
def test_the_error_is_that_of_the_integers_that_ship(recipe: str) -> None:
    config = llama_config()
    record = assign(config, load_recipe(recipe), load_target("android-xnnpack"))["blocks.0.down_proj"]
    weight = random(config.hidden, config.intermediate).float()
    clip = torch.ones(config.hidden, record.spec.groups)
    linear = quantize_linear(record, {"down_proj.weight": weight}, clip, "down_proj")
    assert torch.equal(rounding_error(weight, record.spec.weight), linear.dequantized() - weight)


def kl(p_TV: Tensor, logits_TV: Tensor) -> Tensor:
    return (p_TV * (p_TV.log() - logits_TV.log_softmax(-1))).sum()


def half_second_derivative(function: Callable[[Tensor], Tensor]) -> float:
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(function(step), step, create_graph=True)
    return 0.5 * float(torch.autograd.grad(first, step)[0])
