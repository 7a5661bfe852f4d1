"""The allocation against every combination there is."""

from __future__ import annotations

import random
import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.sensitivity.allocate import Item, allocate, least_bytes

OPTION = st.tuples(st.integers(1, 20), st.one_of(st.floats(0, 4), st.integers(0, 4).map(float)))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def items_of(options: list[list[tuple[int, float]]]) -> list[Item]:
    return [Item(*map(tuple, zip(*item, strict=True))) for item in options]


def total(items: list[Item], chosen: tuple[int, ...]) -> tuple[int, float]:
    return (
        sum(item.bytes[i] for item, i in zip(items, chosen, strict=True)),
        sum(item.damage[i] for item, i in zip(items, chosen, strict=True)),
    )


@settings(max_examples=400, deadline=None)
@given(ITEMS, st.integers(0, 60))
def test_nothing_that_fits_costs_less(options: list[list[tuple[int, float]]], more: int) -> None:
    items = items_of(options)
    budget = least_bytes(items) + more
    size, damage = total(items, allocate(items, budget))
    every = (total(items, chosen) for chosen in product(*(range(len(item.bytes)) for item in items)))
    assert size <= budget
    assert damage <= min(cost for fits, cost in every if fits <= budget) + 1e-9


def test_less_than_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match="4 bytes are fewer than 5"):
        allocate([Item((5, 9), (1.0, 0.0))], 4)


def test_with_bytes_for_all_everything_is_at_its_best() -> None:
    assert allocate([Item((5, 9, 7), (1.0, 0.0, 0.0)), Item((1,), (3.0,))], 100) == (2, 0)


def test_a_large_model_takes_seconds() -> None:
    """80 blocks of 7 linears with 8 grids each, sizes that share no factor."""
    draw = random.Random(0)
    items = []
    for _ in range(560):
        width, damage = draw.choice((8192**2, 8192 * 28672)), draw.lognormvariate(-7, 1.5)
        sizes = [width // 2 + width // g * 2 + draw.randint(0, 999) for g in (32, 64, 96, 128, 192, 256)] + [width]
        items.append(Item(tuple(sizes), tuple(damage * f for f in (1, 1.2, 1.3, 1.4, 1.6, 1.7, 0.01))))
    start = time.process_time()
    budget = sum(item.bytes[0] for item in items)
    size, damage = total(items, allocate(items, budget))
    assert time.process_time() - start < 10
    assert 0 <= budget - size < 50_000 and damage < sum(item.damage[0] for item in items)
