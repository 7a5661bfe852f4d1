"""The integer algorithms against the real functions, on our operators: no tool needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.errors import InputError
from afq_export.lower.tosa import parts
from afq_export.lower.tosa.graph import TosaGraph
from afq_export.lower.tosa.operand import Operand
from afq_export.lower.tosa.scale import multiplier_shift
from afq_export.quantize.activations import range_grid
from afq_export.quantize.checkpoint import StaticRange
from afq_export.validate.integer.tosa import run_graph

CODE = 1.001
"""An integer result may differ from the rounded real one by the rounding of what goes before: one code."""


def computed(inputs: dict[str, np.ndarray], write: Callable[[TosaGraph, dict], Operand]) -> tuple[np.ndarray, Operand]:
    """Codes of what `write` makes of the inputs (i8 or i16 by their type), and their operand."""
    graph = TosaGraph()
    values = {n: graph.input(n, "i8" if a.dtype == np.int8 else "i16", a.shape) for n, a in inputs.items()}
    y = write(graph, values)
    graph.output(y.value, "result")
    return run_graph(graph, inputs)["result"].astype(np.int64), y


def errors(codes: np.ndarray, y: Operand, expected: np.ndarray, grid: StaticRange) -> np.ndarray:
    """By how many codes each result is off, of those inside of the grid."""
    wanted = np.clip(expected / y.scale + y.zero, grid.qmin, grid.qmax)
    return np.abs(codes - wanted)


@given(
    st.floats(0, 500).filter(lambda x: x == 0 or x > 1e-25),
    st.floats(1e-25, 500),
)
def test_a_factor_keeps_31_bits(a: float, b: float) -> None:
    multipliers, shifts = multiplier_shift(np.array([a, b]))
    assert multipliers.dtype == np.int32 and shifts.dtype == np.int8
    assert (shifts >= 2).all() and (shifts <= 62).all() and (multipliers >= 0).all()
    for factor, multiplier, shift in zip((a, b), multipliers, shifts, strict=True):
        unit = 2.0**-62 if factor < 2.0**-32 else factor * 2.0**-30
        assert abs(float(multiplier) * 2.0 ** -float(shift) - factor) <= unit / 2


def test_a_factor_just_below_a_power_of_two_rounds_up_to_it() -> None:
    multiplier, shift = multiplier_shift(1 - 2.0**-40)
    assert (multiplier[0], shift[0]) == (1 << 30, 30)


@settings(deadline=None)
@given(st.sampled_from([8, 48, 64, 172]), st.floats(3, 6), st.integers(0, 1000))
def test_rms_norm(width: int, loud: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = np.clip(np.rint(random.standard_normal((1, 5, width)) * 10 ** random.uniform(2, 3.5, (1, 5, 1))), -32767, 32767)
    weight = 1 + 0.3 * random.standard_normal(width)
    weight[0], weight[1] = loud, -0.7  # a gain may be negative: multipliers may not
    bias = random.standard_normal(width) * 0.1
    step, eps = 2e-3, 1e-5
    real = x * step
    expected = real / np.sqrt((real**2).mean(-1, keepdims=True) + eps) * weight + bias
    grid = range_grid(float(expected.min()), float(expected.max()))
    codes, y = computed(
        {"x": x.astype(np.int16)},
        lambda graph, v: parts.norm(Operand(graph, v["x"], step), weight, bias, eps, grid),
    )
    assert errors(codes, y, expected, grid).max() <= CODE


def test_a_norm_of_zeros_is_zero() -> None:
    grid = StaticRange(0.02, 3)
    codes, _ = computed(
        {"x": np.zeros((1, 2, 16), np.int16)},
        lambda graph, v: parts.norm(Operand(graph, v["x"], 0.01), np.ones(16), None, 1e-5, grid),
    )
    assert (codes == 3).all()


def test_an_epsilon_beyond_the_sum_is_refused() -> None:
    graph = TosaGraph("blocks.0.attn_norm")
    x = Operand(graph, graph.input("x", "i16", (1, 2, 16)), 1e-9)
    with pytest.raises(InputError, match=r"norm_eps does not fit \[blocks.0.attn_norm\]"):
        parts.norm(x, np.ones(16), None, 1e-2, StaticRange(0.02, 0))


@settings(deadline=None, max_examples=40)
@given(st.integers(-40, 40), st.integers(-128, 127), st.integers(-40, 40), st.integers(0, 1000))
def test_attention(q_zero: int, k_zero: int, v_zero: int, seed: int) -> None:
    random, (heads, kv_heads, tokens, past, width) = np.random.default_rng(seed), (4, 2, 3, 6, 8)
    codes = {
        "q": random.integers(-128, 128, (heads, tokens, width)).astype(np.int8),
        "k": random.integers(-128, 128, (kv_heads, width, past + tokens)).astype(np.int8),
        "v": random.integers(-128, 128, (kv_heads, past + tokens, width)).astype(np.int8),
        "mask": np.where(np.arange(past + tokens) > past + np.arange(tokens)[:, None], -1, 0)[None].astype(np.int8),
    }
    steps, zeros = {"q": 0.02, "k": 0.03, "v": 0.01}, {"q": q_zero, "k": k_zero, "v": v_zero}
    q, k, v = ((codes[n].astype(np.float64) - zeros[n]) * steps[n] for n in "qkv")
    k, v = (np.repeat(t, heads // kv_heads, axis=0) for t in (k, v))
    scores = q @ k / np.sqrt(width) + codes["mask"] * 1e9
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    grid = range_grid(float(expected.min()), float(expected.max()))
    seen = scores[scores > -1e8]
    limits = range_grid(float(seen.min()), float(seen.max()), 16)

    def write(graph: TosaGraph, values: dict) -> Operand:
        operands = [Operand(graph, values[name], steps[name], zeros[name]) for name in "qkv"]
        return parts.attention(*operands, parts.hidden(graph, values["mask"]), limits, grid)

    found, y = computed(codes, write)
    # Weights have 8 bits: each is off by half a step at most, of which the row's largest is 255.
    share = (0.5 / 255 * np.abs(v).max(1, keepdims=True) * (past + tokens) / (weights.sum(-1, keepdims=True))) / y.scale
    assert (errors(found, y, expected, grid) <= CODE + 2 * share).all()


def test_a_hidden_token_changes_nothing() -> None:
    random, grid = np.random.default_rng(0), StaticRange(0.01, 5)
    codes = {n: random.integers(-128, 128, (1, 4, 4)).astype(np.int8) for n in "qkv"}
    codes["mask"] = np.where(np.arange(4) > 1, -1, 0)[None, None].repeat(4, 1).astype(np.int8)

    def write(graph: TosaGraph, values: dict) -> Operand:
        operands = [Operand(graph, values[name], 0.05, 7) for name in "qkv"]
        return parts.attention(*operands, parts.hidden(graph, values["mask"]), StaticRange(1e-3, 0, 16), grid)

    before, _ = computed(codes, write)
    codes["k"][:, :, 2:], codes["v"][:, 2:] = 127, -128
    after, _ = computed(codes, write)
    assert (before == after).all()


def test_scores_beyond_their_range_are_refused() -> None:
    graph = TosaGraph("blocks.0.attention")
    q, k, v, mask = (graph.input(n, "i8", (1, 4, 4)) for n in ("q", "k", "v", "mask"))
    operands = [Operand(graph, value, 1.0) for value in (q, k, v)]
    with pytest.raises(InputError, match="the range of scores does not fit"):
        parts.attention(*operands, parts.hidden(graph, mask), StaticRange(1e-9, 0, 16), StaticRange(0.1, 0))


@pytest.mark.parametrize("name", ["silu", "relu", "gelu"])
@pytest.mark.parametrize("largest", [0.5, 6.0, 40.0])
def test_a_nonlinearity_by_table(name: str, largest: float) -> None:
    function = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}[name]
    x, step = np.arange(-32768, 32768, dtype=np.int16), largest / 32767
    codes, y = computed(
        {"x": x},
        lambda graph, v: parts.activation(
            Operand(graph, v["x"], step), lambda at: function(torch.from_numpy(at)).numpy()
        ),
    )
    expected = function(torch.from_numpy(x * step)).numpy()
    # A segment of the table is a 512th of the range; its chord leaves the function by the second derivative's share.
    chord = (2 * largest / 512) ** 2 / 8 * 0.8
    assert (
        np.abs(codes * y.scale - expected).max() <= chord + 2 * y.scale + (largest / 512 if name == "relu" else 0) * 0.1
    )


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 10), st.floats(1e-3, 10), st.integers(0, 1000))
def test_sums_and_products(a: float, b: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, y = (random.integers(-32767, 32768, (2, 9)).astype(np.int16) for _ in range(2))
    steps = a / 32767, b / 32767
    for function, expected, bits in (
        (parts.add, x * steps[0] + y * steps[1], 16),
        (parts.multiply, x * steps[0] * (y * steps[1]), 8),
    ):
        grid = range_grid(float(expected.min()), float(expected.max()), bits)
        codes, result = computed(
            {"x": x, "y": y},
            lambda g, v, f=function, grid=grid: f(Operand(g, v["x"], steps[0]), Operand(g, v["y"], steps[1]), grid),
        )
        assert errors(codes, result, expected, grid).max() <= 0.51


def test_rotation() -> None:
    random = np.random.default_rng(0)
    x = random.integers(-32767, 32768, (1, 3, 2, 8)).astype(np.int16)
    angles = random.uniform(0, 6, (3, 4))
    cos, sin = np.cos(angles), np.sin(angles)
    tables = {"cos": np.concatenate((cos, cos), 1), "sin": np.concatenate((-sin, sin), 1)}
    codes = {"x": x} | {n: np.rint(t * 2**14).astype(np.int16)[None, :, None, :] for n, t in tables.items()}
    halves = x[..., :4] * 1e-3, x[..., 4:] * 1e-3
    c, s = cos[None, :, None], sin[None, :, None]
    expected = np.concatenate((halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s), -1)
    grid = range_grid(float(expected.min()), float(expected.max()))
    found, y = computed(
        codes,
        lambda graph, v: parts.rotate(
            Operand(graph, v["x"], 1e-3), *(Operand(graph, v[n], 2.0**-14) for n in ("cos", "sin")), grid
        ),
    )
    assert errors(found, y, expected, grid).max() <= 0.51


def test_epsilon_counts_where_a_row_is_small() -> None:
    random, step, eps = np.random.default_rng(0), 1e-4, 1e-5
    x = random.integers(-60, 61, (1, 4, 64)).astype(np.int16)
    expected = x * step / np.sqrt(((x * step) ** 2).mean(-1, keepdims=True) + eps)
    grid = range_grid(float(expected.min()), float(expected.max()))
    codes, y = computed(
        {"x": x}, lambda graph, v: parts.norm(Operand(graph, v["x"], step), np.ones(64), None, eps, grid)
    )
    assert errors(codes, y, expected, grid).max() <= CODE
    without = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True))
    assert errors(codes, y, without, grid).max() > 20
