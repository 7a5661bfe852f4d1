"""What lies between the linears, in integers: RMSNorm, softmax, rotation, nonlinearity, sums and products.

Codes are 16 bits wherever they are no input of a CONV2D or MATMUL; products and sums are 32 bits. A quotient by a
number that may be of any size (mean square, sum of exponentials) is made of that number shifted left until its highest
bit is set (CLZ), a 16-bit table of its significand, and the numerator shifted left by as much:

    RMSNorm    n = sum(x^2) 2^-k + eps, h = (clz(n) - 1) / 2, u = n 4^h 2^-31 in [1/4, 1)
               x / sqrt(n) = (x 2^h) u^(-1/2) 2^(-31/2)
    softmax    e = exp(s - max s) in 8 bits, n = sum(e), h = clz(n) - 1, u = n 2^h 2^-31 in [1/2, 1)
               sum(e v) / n = (sum(e v) 2^h) u^-1 2^-31

so that the weighted values are divided, not the weights, which keep all their 8 bits. Tables have 512 segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from afq_export.errors import InputError
from afq_export.lower.tosa.graph import TosaGraph, Value
from afq_export.lower.tosa.operand import HALF, Operand, bits_for, filled, stored
from afq_export.quantize.checkpoint import StaticRange

TABLE_BITS = 7
"""Bits that TABLE adds to its entries."""
MASKED = 1 << 26
"""What a hidden token's score is lowered by, in 16-bit codes: it saturates at the lowest, wherever it was."""
SUM_HEADROOM = 8
"""Bits that the terms of a residual sum have below the result's last one."""
WEIGHT_ZERO, WEIGHT_STEPS = -128, 255
"""Zero point and largest code (less it) of the 8-bit exponentials."""


def norm(x: Operand, weight: np.ndarray, bias: np.ndarray | None, eps: float, grid: StaticRange) -> Operand:
    """RMSNorm over the last dimension of 16-bit `x`, on `grid`."""
    graph, width = x.graph, x.shape[-1]
    k = bits_for(width)
    squares = x.with_value(graph.multiply(x.value, x.value))
    n = graph.reduce("REDUCE_SUM", squares.to("i32", 2.0**-k).value)
    least = max(1, round(eps * width / (2.0**k * x.scale**2)))
    if least >= 1 << 30:
        raise InputError(
            "norm_eps does not fit", where=graph.scope, why=f"{eps:g} is {least} steps of {x.scale:g} squared"
        )
    n = graph.add(n, graph.constant(filled(n.shape[-1:], least).reshape([1] * len(n.shape)), "i32"))
    h = graph.shift_right(_headroom(graph, n), _ones(graph, n))
    root = _significand(graph, graph.shift_left(n, graph.add(h, h)), lambda u: 1 / math.sqrt(u), 0.25)
    c = (k + 2) // 2
    shifted = Operand(graph, graph.shift_left(x.to("i32", 1.0).value, h), 1.0).to("i16", 2.0**-c)
    y = Operand(graph, graph.multiply(shifted.value, root), 1.0).to("i16", 2.0**-15)
    # A code of y: 2^15 products of a shifted x (2^c) and a table value (2 / HALF), times 2^-15.5; then the mean.
    step = 2.0 ** (15 + c - 15.5) * 2 / HALF * math.sqrt(width / 2.0**k)
    largest = float(np.abs(weight).max()) or 1.0
    gain = np.rint(weight.astype(np.float64) / largest * HALF).reshape([1] * (len(x.shape) - 1) + [width])
    product = Operand(graph, graph.multiply(y.value, graph.constant(gain, "i16")), step * largest / HALF)
    if bias is not None:
        shift = graph.constant(np.rint(bias.astype(np.float64) / product.scale).reshape(gain.shape), "i32")
        product = product.with_value(graph.add(product.value, shift))
    return product.on(grid)


def attention(
    q: Operand, keys: Operand, values: Operand, mask: Value, scores: StaticRange, grid: StaticRange
) -> Operand:
    """Attention of q i8 [H, T, d] over keys i8 [K, d, N] and values i8 [K, N, d]: i8 [H, T, d] on `grid`.

    `mask` i32 [1, T, N] is added to the scores. `scores`: the range that they have, scaled.
    """
    graph, (heads, tokens, width), (kv_heads, _, total) = q.graph, q.shape, keys.shape
    if total * WEIGHT_STEPS >= 1 << 22:
        raise InputError("too many tokens for one attention", where=graph.scope, why=f"{total}, at most 16448")
    grouped = q.view(kv_heads, heads // kv_heads * tokens, width)
    product = graph.matmul(grouped.value, keys.value, q.zero, keys.zero)
    s = Operand(graph, graph.reshape(product, (heads, tokens, total)), q.scale * keys.scale / math.sqrt(width))
    step, _, _ = stored(scores)
    if width * 255**2 * s.scale / step >= MASKED - (1 << 15):
        raise InputError(
            "the range of scores does not fit", where=graph.scope, why=f"products of {s.scale:g}, steps of {step:g}"
        )
    s = s.to("i32", s.scale / step)
    s = s.with_value(graph.add(s.value, mask)).to("i16", 1.0)
    largest = s.with_value(graph.reduce("REDUCE_MAX", s.value))
    below = s.with_value(graph.subtract(s.to("i32", 1.0).value, largest.to("i32", 1.0).value))
    weights = _exponentials(below)
    n = graph.reduce("REDUCE_SUM", weights.to("i32", 1.0).value)
    flat = graph.reshape(weights.value, (kv_heads, heads // kv_heads * tokens, total))
    u = graph.reshape(graph.matmul(flat, values.value, weights.zero, values.zero), (heads, tokens, width))
    h = _headroom(graph, n)
    inverse = _significand(graph, graph.shift_left(n, h), lambda u: 1 / u, 0.5)
    less = graph.subtract(h, graph.constant(filled((1, 1, 1), 8), "i32"))
    shifted = Operand(graph, graph.shift_left(u, less), 1.0).to("i16", 2.0**-16)
    y = Operand(graph, graph.multiply(shifted.value, inverse), values.scale * 2.0**-7 * 2 / HALF)
    return y.on(grid)


def hidden(graph: TosaGraph, mask: Value) -> Value:
    """What is added to scores: 0 where `mask` i8 is 0, a large negative number where it is -1."""
    with graph.part("mask"):
        return Operand(graph, mask, 1.0).to("i32", MASKED).value


def rotate(x: Operand, cos: Operand, sin: Operand, grid: StaticRange) -> Operand:
    """Rotary embedding of 16-bit heads [B, T, H, d] on `grid`; cos and sin i16 [B, T, 1, d], sin with its first half's
    sign turned."""
    graph, half = x.graph, x.shape[-1] // 2
    size = (*x.shape[:-1], half)
    start = (0,) * (len(size) - 1)
    swapped = [graph.slice(x.value, (*start, first), size) for first in (half, 0)]
    along = graph.multiply(x.value, cos.value)
    across = graph.multiply(graph.concat(swapped, len(size) - 1), sin.value)
    return x.with_value(graph.add(along, across), cos.scale).on(grid)


def activation(x: Operand, function: Callable[[np.ndarray], np.ndarray]) -> Operand:
    """A nonlinearity of 16-bit `x`: 16 bits, on a grid of its own that covers all it can give."""
    points = function(np.arange(-32768, 32769, 128, dtype=np.float64) * x.scale)
    scale = float(np.abs(points).max()) / HALF or 1.0
    looked_up = x.graph.table(x.value, np.rint(points / scale))
    return Operand(x.graph, looked_up, scale * 2.0**-TABLE_BITS).to("i16", 2.0**-TABLE_BITS)


def add(x: Operand, y: Operand, grid: StaticRange) -> Operand:
    """The sum of two 16-bit operands on `grid`: both in 32 bits on a finer common grid first."""
    step = max(x.scale, y.scale) * 2.0**-SUM_HEADROOM
    terms = [term.to("i32", term.scale / step) for term in (x, y)]
    return terms[0].with_value(x.graph.add(terms[0].value, terms[1].value)).on(grid)


def multiply(x: Operand, y: Operand, grid: StaticRange) -> Operand:
    """The product of two 16-bit operands on `grid`."""
    return x.with_value(x.graph.multiply(x.value, y.value), y.scale).on(grid)


def _exponentials(below: Operand) -> Operand:
    """exp of 32-bit numbers that are at most 0: 8 bits, 255 steps to 1. What is below 2^-15 is 0."""
    floor = 15 * math.log(2)
    x = below.to("i16", below.scale * 32768 / floor)
    entries = np.exp(np.minimum(np.arange(-256, 257) / 256, 0) * floor) * HALF
    e = Operand(x.graph, x.graph.table(x.value, np.rint(entries)), 2.0**-TABLE_BITS / HALF)
    return e.on(StaticRange(1 / WEIGHT_STEPS, WEIGHT_ZERO))


def _headroom(graph: TosaGraph, n: Value) -> Value:
    """By how many bits positive int32 numbers can be shifted left without reaching the sign."""
    return graph.subtract(graph.leading_zeros(n), _ones(graph, n))


def _ones(graph: TosaGraph, like: Value) -> Value:
    return graph.constant(filled((1,) * len(like.shape), 1), "i32")


def _significand(graph: TosaGraph, m: Value, function: Callable[[float], float], least: float) -> Value:
    """`function(m 2^-31) HALF / 2` in 16 bits, for int32 m with m 2^-31 in [least, 1) and values up to 2."""
    u = Operand(graph, m, 1.0).to("i16", 2.0**-16)
    points = np.array([function(max(index / 256 - 1, least)) for index in range(513)])
    looked_up = graph.table(u.value, np.rint(points * HALF / 2))
    return Operand(graph, looked_up, 1.0).to("i16", 2.0**-TABLE_BITS).value
