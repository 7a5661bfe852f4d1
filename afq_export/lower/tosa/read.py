"""Reads a TOSA flatbuffer back into the graph that it was written from."""

from __future__ import annotations

from typing import Any

import numpy as np

from afq_export.errors import InputError, VerdictError
from afq_export.lower.tosa.decoder import Shape, write_decoder
from afq_export.lower.tosa.file import require_serializer
from afq_export.lower.tosa.graph import NUMPY, Operator, TosaGraph, Value
from afq_export.quantize.checkpoint import QuantizedCheckpoint

ATTRIBUTES = {
    "CONV2D": "Conv2dAttribute",
    "RESCALE": "RescaleAttribute",
    "REDUCE_SUM": "ReduceSumAttribute",
    "REDUCE_MAX": "ReduceMaxAttribute",
    "CONCAT": "ConcatAttribute",
    "TRANSPOSE": "TransposeAttribute",
    "ARITHMETIC_RIGHT_SHIFT": "ArithmeticRightShiftAttribute",
}
"""Operators whose attributes matter -> the table of the schema that holds them."""
CONSTANTS = ("CONST", "CONST_SHAPE")


def read_tosa(program: bytes, where: str) -> TosaGraph:
    """The graph of a program that this package wrote.

    Raises MissingToolError without tosa-tools, InputError for a file that is none, or that holds what we never write.
    """
    require_serializer()
    from tosa.DType import DType
    from tosa.Op import Op
    from tosa.TosaGraph import TosaGraph as Schema

    if not Schema.TosaGraphBufferHasIdentifier(program, 0):
        raise InputError("not a TOSA program", where=where)
    kinds = {number: name for name, number in vars(Op).items() if not name.startswith("_")}
    types = {DType.INT8: "i8", DType.INT16: "i16", DType.INT32: "i32"}
    block = Schema.GetRootAs(program, 0).Regions(0).Blocks(0)
    graph = TosaGraph()
    for index in range(block.TensorsLength()):
        tensor = block.Tensors(index)
        name, type = tensor.Name().decode(), types.get(tensor.Type())
        if type is None:
            raise InputError("a tensor is not of ours", where=f"{where}: {name}", why=f"type {tensor.Type()}")
        shape = tuple(tensor.Shape(i) for i in range(tensor.ShapeLength()))
        graph.values[name] = Value(name, type, shape)
        if tensor.DataLength():
            count = graph.values[name].elements
            data = tensor.DataAsNumpy().view(np.uint8)[: count * np.dtype(NUMPY[type]).itemsize]
            graph.constants[name] = data.view(NUMPY[type]).reshape(shape)
    for index in range(block.ShapesLength()):
        sizes = block.Shapes(index)
        name = sizes.Name().decode()
        graph.values[name] = Value(name, "shape", (sizes.Rank(),))
        graph.constants[name] = sizes.DataAsNumpy().view(np.int64)
    graph.inputs = [block.Inputs(i).decode() for i in range(block.InputsLength())]
    graph.outputs = [block.Outputs(i).decode() for i in range(block.OutputsLength())]
    for index in range(block.OperatorsLength()):
        operator = block.Operators(index)
        kind = kinds[operator.Op()]
        if kind not in CONSTANTS:
            inputs = tuple(operator.Inputs(i).decode() for i in range(operator.InputsLength()))
            graph.operators.append(
                Operator(kind, inputs, operator.Outputs(0).decode(), _attributes(kind, operator, where))
            )
    return graph


def verify_tosa(found: TosaGraph, checkpoint: QuantizedCheckpoint, shape: Shape) -> None:
    """Raises VerdictError when a program is not the checkpoint's: its integers first, then everything else of it."""
    for name in checkpoint.records:
        linear = checkpoint.linear(name)
        codes = found.constants.get(f"{name}.codes")
        if codes is None or not np.array_equal(codes.reshape(len(codes), -1), linear.codes.numpy()):
            raise VerdictError("the program does not hold the checkpoint's integers", where=name)
    difference = same_graph(write_decoder(checkpoint, shape), found)
    if difference:
        raise VerdictError("the program is not the checkpoint's", where=difference)


def read_linears(graph: TosaGraph) -> dict[str, tuple[int, int]]:
    """(O, I) of every linear by name, in running order."""
    codes = {operator.inputs[1] for operator in graph.operators if operator.kind == "CONV2D"}
    return {
        name.removesuffix(".codes"): (value.shape[0], value.shape[-1])
        for name, value in graph.values.items()
        if name in codes
    }


def same_graph(a: TosaGraph, b: TosaGraph) -> str:
    """The first thing in which two graphs differ; empty when they are the same program."""
    for what in ("inputs", "outputs", "values", "operators"):
        if getattr(a, what) != getattr(b, what):
            return what
    different = (name for name in a.constants if not np.array_equal(a.constants[name], b.constants.get(name)))
    return next(different, "" if a.constants.keys() == b.constants.keys() else "constants")


def _attributes(kind: str, operator: Any, where: str) -> dict[str, Any]:
    """The attributes as `TosaGraph` has them. Raises InputError for values that it never writes."""
    if kind not in ATTRIBUTES:
        return {}
    import importlib

    table = getattr(importlib.import_module(f"tosa.{ATTRIBUTES[kind]}"), ATTRIBUTES[kind])()
    attribute = operator.Attribute()
    table.Init(attribute.Bytes, attribute.Pos)
    match kind:
        case "CONV2D":
            plain = [table.Pad(i) for i in range(4)] == [0] * 4
            plain &= [table.Stride(i) for i in range(2)] == [table.Dilation(i) for i in range(2)] == [1, 1]
            found: dict[str, Any] = {}
        case "RESCALE":
            plain = table.Scale32() and table.RoundingMode() == _single_round()
            plain = plain and not table.InputUnsigned() and not table.OutputUnsigned()
            found = {"per_channel": bool(table.PerChannel())}
        case "TRANSPOSE":
            plain, found = True, {"perms": [table.Perms(i) for i in range(table.PermsLength())]}
        case "ARITHMETIC_RIGHT_SHIFT":
            plain, found = not table.Round(), {}
        case _:
            plain, found = True, {"axis": table.Axis()}
    if not plain:
        raise InputError("an operator is not as we write it", where=f"{where}: {operator.Outputs(0).decode()}")
    return found


def _single_round() -> int:
    from tosa.RoundingMode import RoundingMode

    return RoundingMode.SINGLE_ROUND
