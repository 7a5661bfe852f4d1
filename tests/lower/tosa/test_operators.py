"""Every operator of ours against Arm's reference model, on random and on extreme values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from afq_export.errors import InputError
from afq_export.lower.tosa.file import write_tosa
from afq_export.lower.tosa.graph import RANGE, TosaGraph, Value
from afq_export.lower.tosa.read import read_tosa, same_graph
from afq_export.lower.tosa.scale import multiplier_shift
from afq_export.runtime.tosa import reference_model
from afq_export.validate.integer.tosa import run_graph

pytest.importorskip("tosa_reference_model", reason="Arm's tosa-tools are not installed")
pytest.importorskip("tosa_serializer", reason="Arm's tosa-tools are not installed")

RANDOM = np.random.default_rng(0)
FACTORS = 10.0 ** RANDOM.uniform(-6, 0.5, 12)
ENTRIES = RANDOM.integers(-9000, 9000, 513)
WEIGHTS = {bits: RANDOM.integers(-(1 << (bits - 1)), 1 << (bits - 1), (7, 12)) for bits in (4, 8)}
SMALL = ("i32", 16)
"""Values of 32 bits whose products and sums fit."""

CASES: dict[str, tuple[dict[str, tuple], Callable[..., Value]]] = {
    "conv2d, 8 bits": ({"x": ("i8", (5, 12))}, lambda g, x: g.conv2d(x, WEIGHTS[8], RANDOM.integers(-99, 99, 7), -7)),
    "conv2d, 4 bits": ({"x": ("i8", (5, 12))}, lambda g, x: g.conv2d(x, WEIGHTS[4], RANDOM.integers(-99, 99, 7), 127)),
    "matmul": (
        {"a": ("i8", (2, 5, 12)), "b": ("i8", (2, 12, 3))},
        lambda g, a, b: g.matmul(a, b, -128, 127),
    ),
    "table": ({"x": ("i16", (3, 999))}, lambda g, x: g.table(x, ENTRIES)),
    "add": ({"a": (SMALL, (2, 9)), "b": (SMALL, (2, 1))}, lambda g, a, b: g.add(a, b)),
    "subtract": ({"a": (SMALL, (2, 9)), "b": (SMALL, (2, 1))}, lambda g, a, b: g.subtract(a, b)),
    "multiply, 16 bits": ({"a": ("i16", (2, 9)), "b": ("i16", (1, 9))}, lambda g, a, b: g.multiply(a, b)),
    "multiply, 32 bits": ({"a": (SMALL, (2, 9)), "b": (("i32", 14), (2, 1))}, lambda g, a, b: g.multiply(a, b)),
    "clz": ({"x": ("i32", (4, 64))}, lambda g, x: g.leading_zeros(x)),
    "shift left": ({"a": (SMALL, (2, 9)), "b": ("shift", (2, 1))}, lambda g, a, b: g.shift_left(a, b)),
    "shift right": ({"a": ("i32", (2, 9)), "b": ("shift", (2, 1))}, lambda g, a, b: g.shift_right(a, b)),
    "sum": ({"x": (SMALL, (3, 5, 40))}, lambda g, x: g.reduce("REDUCE_SUM", x)),
    "maximum": ({"x": ("i16", (3, 5, 40))}, lambda g, x: g.reduce("REDUCE_MAX", x)),
    "concat": ({"a": ("i8", (2, 3, 4)), "b": ("i8", (2, 5, 4))}, lambda g, a, b: g.concat([a, b], 1)),
    "slice": ({"x": ("i16", (2, 6, 8))}, lambda g, x: g.slice(x, (0, 1, 4), (2, 3, 4))),
    "transpose": ({"x": ("i8", (2, 6, 8))}, lambda g, x: g.transpose(x, (1, 2, 0))),
    "reshape": ({"x": ("i16", (2, 6, 8))}, lambda g, x: g.reshape(x, (12, 8))),
}
for source, target in [("i8", "i16"), ("i8", "i32"), ("i16", "i8"), ("i16", "i32"), ("i32", "i8"), ("i32", "i16")]:
    CASES[f"rescale, {source} to {target}"] = (
        {"x": (source if source != "i32" else ("i32", 24), (4, 12))},
        lambda g, x, source=source, target=target: g.rescale(
            x, target, *multiplier_shift(FACTORS), 11 * (source == "i8"), -9 * (target == "i8")
        ),
    )


def values(kind: str | tuple[str, int], shape: tuple[int, ...], extreme: bool) -> np.ndarray:
    """Random codes of a type; `extreme`: only its ends, 0 and what is next to them."""
    if kind == "shift":
        return RANDOM.integers(0, 15, shape).astype(np.int32)
    type, bits = (kind, 0) if isinstance(kind, str) else kind
    low, high = (-(1 << bits), (1 << bits) - 1) if bits else RANGE[type]
    dtype = {"i8": np.int8, "i16": np.int16, "i32": np.int32}[type]
    if extreme:
        return RANDOM.choice([low, low + 1, -1, 0, 1, high - 1, high], shape).astype(dtype)
    return RANDOM.integers(low, high, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_the_reference_models(name: str) -> None:
    operands, write = CASES[name]
    graph = TosaGraph("test")
    types = {
        n: "i32" if kind == "shift" else kind if isinstance(kind, str) else kind[0] for n, (kind, _) in operands.items()
    }
    given = [graph.input(n, types[n], shape) for n, (_, shape) in operands.items()]
    graph.output(write(graph, *given), "result")
    program = write_tosa(graph)
    assert same_graph(graph, read_tosa(program, "test")) == ""
    execute = reference_model(program, tuple(graph.inputs), ("result",))
    for extreme in (False, True):
        inputs = {n: values(kind, shape, extreme) for n, (kind, shape) in operands.items()}
        ours, theirs = run_graph(graph, inputs)["result"], execute(inputs)["result"]
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def test_the_reference_model_does_not_write_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    graph = TosaGraph("test")
    graph.output(graph.leading_zeros(graph.input("x", "i32", (1, 2))), "result")
    reference_model(write_tosa(graph), ("x",), ("result",))({"x": np.ones((1, 2), np.int32)})
    assert capfd.readouterr().out == ""


def test_an_operator_that_we_never_write_is_refused() -> None:
    import tosa_serializer as ts

    for rounding, refused in ((False, False), (True, True)):
        serializer = ts.TosaSerializer("", targetMajor=1, targetMinor=0, targetPatch=0, targetDraft=False)
        for name in ("a", "b"):
            serializer.addInputTensor(ts.TosaSerializerTensor(name, [1, 2], ts.DType.INT32))
        block = serializer.currRegion.currBasicBlock
        block.addTensor("y", [1, 2], ts.DType.INT32)
        block.addOutput("y")
        attribute = ts.TosaSerializerAttribute()
        attribute.ArithmeticRightShiftAttribute(rounding)
        serializer.addOperator(ts.Op.ARITHMETIC_RIGHT_SHIFT, ["a", "b"], ["y"], attribute)
        program = bytes(serializer.serialize())
        if refused:
            with pytest.raises(InputError, match=r"not as we write it \[test: y\]"):
                read_tosa(program, "test")
        else:
            assert [operator.kind for operator in read_tosa(program, "test").operators] == ["ARITHMETIC_RIGHT_SHIFT"]
