"""The multiple-choice knapsack: one option of each item, the least damage that fits into a number of bytes. Exact.

The Lagrangian relaxation (its multiplier: damage per byte where the greedy way along the convex hulls runs out of
bytes) gives a bound below, that way's end a solution above it. In the best solution no item's choice can lie further
above the relaxation's choice than these two lie apart, which leaves few choices; dynamic programming over the sizes
that they make goes through all of them (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

TOLERANCE = 1e-12
"""Of the damages' sum: below it two solutions are the same."""


@dataclasses.dataclass(frozen=True)
class Item:
    """Whole bytes and damage of each option."""

    bytes: tuple[int, ...]
    damage: tuple[float, ...]


def least_bytes(items: Sequence[Item]) -> int:
    """Of the smallest option everywhere."""
    return sum(min(item.bytes) for item in items)


def allocate(items: Sequence[Item], budget: int) -> tuple[int, ...]:
    """The index of every item's option. Raises ValueError below `least_bytes`."""
    if budget < least_bytes(items):
        raise ValueError(f"{budget} bytes are fewer than {least_bytes(items)}")
    chosen, price = _greedy(items, budget)
    if price == 0:
        return chosen
    known = sum(item.damage[i] for item, i in zip(items, chosen, strict=True))
    excess = [_excess(item, price) for item in items]
    bound = sum(float((np.array(i.damage) + price * np.array(i.bytes)).min()) for i in items) - price * budget
    scale = sum(max(item.damage) for item in items)
    return _search(items, excess, budget, known - bound + TOLERANCE * scale)


def _greedy(items: Sequence[Item], budget: int) -> tuple[tuple[int, ...], float]:
    """Steps up the convex hulls, most damage saved per byte first, those left out that do not fit.

    With the price of the first such step: damage per byte; 0 when all fit, and the choice is the best there is.
    """
    hulls = [_hull(item) for item in items]
    chosen, left, price = [hull[0] for hull in hulls], budget, 0.0
    steps = []
    for number, (item, hull) in enumerate(zip(items, hulls, strict=True)):
        left -= item.bytes[hull[0]]
        for one, other in pairwise(hull):
            more = item.bytes[other] - item.bytes[one]
            steps.append(((item.damage[one] - item.damage[other]) / more, number, one, other, more))
    for saved, number, one, other, more in sorted(steps, key=lambda step: (-step[0], step[1])):
        if chosen[number] == one and more <= left:
            chosen[number], left = other, left - more
        else:
            price = price or saved
    return tuple(chosen), price


def _hull(item: Item) -> list[int]:
    """Options on the lower convex hull of damage over bytes, bytes growing, damage falling."""
    hull: list[int] = []
    for option in sorted(range(len(item.bytes)), key=lambda i: (item.bytes[i], item.damage[i])):
        if hull and item.damage[option] >= item.damage[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(item, hull[-2], hull[-1]) >= _slope(item, hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(item: Item, one: int, other: int) -> float:
    return (item.damage[other] - item.damage[one]) / (item.bytes[other] - item.bytes[one])


def _excess(item: Item, price: float) -> np.ndarray:
    """How far each option lies above the relaxation's choice, at `price` a byte."""
    cost = np.array(item.damage) + price * np.array(item.bytes)
    return cost - cost.min()


def _search(items: Sequence[Item], excess: Sequence[np.ndarray], budget: int, gap: float) -> tuple[int, ...]:
    """The best solution whose excess is at most `gap`. A state is a sum of bytes; of equal ones the best is kept."""
    least = np.cumsum([0] + [min(item.bytes) for item in reversed(items)])[::-1]
    sizes, damages, gaps = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    for number, item in enumerate(items):
        options = np.flatnonzero(excess[number] <= gap)
        parent = np.tile(np.arange(len(sizes)), len(options))
        option = np.repeat(options, len(sizes))
        size = sizes[parent] + np.array(item.bytes, np.int64)[option]
        damage, above = damages[parent] + np.array(item.damage)[option], gaps[parent] + excess[number][option]
        order = np.flatnonzero((size + least[number + 1] <= budget) & (above <= gap))
        order = order[np.lexsort((damage[order], size[order]))]
        best = np.minimum.accumulate(damage[order])
        order = order[np.concatenate(([True], best[1:] < best[:-1]))]
        sizes, damages, gaps = size[order], damage[order], above[order]
        taken.append((parent[order], option[order]))
    state, chosen = int(damages.argmin()), []
    for parents, options in reversed(taken):
        chosen.append(int(options[state]))
        state = int(parents[state])
    return tuple(reversed(chosen))
