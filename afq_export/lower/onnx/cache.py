"""The quantized KV cache as nodes: what `quantize/cache.py` defines, to the bit, with the standard's operators alone.

past, present   uint8 [B, K, tokens, R]      a head's row of R bytes: its codes, steps, minima (`CacheRows.packed`)

Everything is in one tensor, so that whoever carries float caches from call to call carries these alike: onnxruntime-
genai, optimum, the device runners. Floats become bytes and back by BitCast (opset 26) and shifts, never by rounding.
All rows are read back in every call, those of its own tokens too: prefill and decode see the same keys and values.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.operand import Operand
from afq_export.quantize.activations import LEAST_LARGEST
from afq_export.quantize.cache import GRID_BYTES, row_bytes
from afq_export.spec.recipe import KvCache

OPSET = 26
"""The first with BitCast."""
SHIFTS = (0, 8, 16, 24)
"""Where the bytes of a float lie in its 32 bits, the first in the file at the low end."""


def write_cached(x: Operand, cache: KvCache, past: str, present: str) -> str:
    """Appends keys or values `x` [B, T, K, d] to the cache `past` and names it `present`; all of it as float32
    [B, K, total, d]."""
    rows = _rows(x, cache)
    rows = x.graph.node("Transpose", [rows], f"{present}.rows", perm=[0, 2, 1, 3])
    return read_back(x.graph, x.graph.node("Concat", [past, rows], present, axis=2), cache, x.shape[3])


def _rows(x: Operand, cache: KvCache) -> str:
    """uint8 [B, T, K, R]: every head on its grids."""
    graph, (batch, tokens, heads, width) = x.graph, x.shape
    group = cache.group or width
    name = f"{x.value}.cached"
    values = x.as_stored((batch, tokens, heads, width // group, group))
    least, most = (
        graph.node(operator, [values, graph.integers(-1)], f"{name}.{end}", keepdims=1)
        for operator, end in (("ReduceMin", "least"), ("ReduceMax", "most"))
    )
    floor, steps = (_float(graph, number) for number in (LEAST_LARGEST, (1 << cache.bits) - 1))
    span = graph.node("Max", [graph.node("Sub", [most, least], f"{name}.range"), floor], f"{name}.span")
    step = graph.node("Div", [span, steps], f"{name}.step")
    above = graph.node("Div", [graph.node("Sub", [values, least], f"{name}.above"), step], f"{name}.steps")
    codes = graph.node("Round", [above], f"{name}.rounded")
    codes = graph.node("Reshape", [codes, graph.integers(0, 0, heads, width)], f"{name}.row")
    if cache.bits == 4:
        low, high = graph.nodes_of("Split", [codes], [f"{name}.low", f"{name}.high"], axis=-1, num_outputs=2)
        codes = graph.node("Add", [low, graph.node("Mul", [high, _float(graph, 16)])], f"{name}.pairs")
    codes = graph.node("Cast", [codes], f"{name}.codes", to=TensorProto.UINT8)
    grids = graph.node("Concat", [step, least], f"{name}.grids", axis=-2)
    words = graph.node("BitCast", [grids], f"{name}.words", to=TensorProto.UINT32)
    shifts = graph.constant(np.array(SHIFTS, np.uint32), "shifts")
    parts = graph.node("BitShift", [words, shifts], f"{name}.shifted", direction="RIGHT")
    parts = graph.node("BitwiseAnd", [parts, graph.constant(np.array(255, np.uint32), "byte")], f"{name}.parts")
    parts = graph.node("Cast", [parts], f"{name}.bytes", to=TensorProto.UINT8)
    size = GRID_BYTES * (width // group)
    parts = graph.node("Reshape", [parts, graph.integers(0, 0, heads, size)], f"{name}.tail")
    return graph.node("Concat", [codes, parts], name, axis=-1)


def read_back(graph: OnnxGraph, rows: str, cache: KvCache, width: int) -> str:
    """Float32 [B, K, total, d] of a cache uint8 [B, K, total, R]."""
    groups = width // (cache.group or width)
    ends = graph.integers(row_bytes(cache, width) - GRID_BYTES * groups, GRID_BYTES * groups)
    codes, tail = graph.nodes_of("Split", [rows, ends], [f"{rows}.codes", f"{rows}.tail"], axis=-1)
    if cache.bits == 4:
        fifteen, four = (graph.constant(np.array(number, np.uint8), "byte") for number in (15, 4))
        low = graph.node("BitwiseAnd", [codes, fifteen], f"{rows}.low")
        high = graph.node("BitShift", [codes, four], f"{rows}.high", direction="RIGHT")
        codes = graph.node("Concat", [low, high], f"{rows}.apart", axis=-1)
    parts = graph.node("Reshape", [tail, graph.integers(0, 0, 0, 2 * groups, len(SHIFTS))], f"{rows}.parts")
    parts = graph.node("Cast", [parts], f"{rows}.wide", to=TensorProto.INT64)
    powers = graph.constant(np.array([1 << shift for shift in SHIFTS], np.int64), "powers")
    parts = graph.node("Mul", [parts, powers], f"{rows}.placed")
    words = graph.node("ReduceSum", [parts, graph.integers(-1)], f"{rows}.sums", keepdims=int(groups > 1))
    words = graph.node("Cast", [words], f"{rows}.words", to=TensorProto.UINT32)
    grids = graph.node("BitCast", [words], f"{rows}.grids", to=TensorProto.FLOAT)
    axis = -2 if groups > 1 else -1
    names = [f"{rows}.step", f"{rows}.least"]
    step, least = graph.nodes_of("Split", [grids], names, axis=axis, num_outputs=2)
    values = graph.node("Cast", [codes], f"{rows}.values", to=TensorProto.FLOAT)
    if groups > 1:
        values = graph.node("Reshape", [values, graph.integers(0, 0, 0, groups, width // groups)], f"{rows}.groups")
    values = graph.node("Add", [graph.node("Mul", [values, step], f"{rows}.scaled"), least], f"{rows}.floats")
    if groups > 1:
        values = graph.node("Reshape", [values, graph.integers(0, 0, 0, width)], f"{rows}.heads")
    return values


def _float(graph: OnnxGraph, value: float) -> str:
    return graph.constant(np.array(value, np.float32), "number")
