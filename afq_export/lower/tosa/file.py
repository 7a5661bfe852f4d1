"""TOSA flatbuffers: a graph written with Arm's serializer, and read back."""

from __future__ import annotations

from typing import Any

from afq_export.errors import MissingToolError
from afq_export.extras import ETHOS_U
from afq_export.lower.tosa.graph import Operator, TosaGraph


def require_serializer() -> Any:
    """Arm's serializer. Raises MissingToolError without it."""
    try:
        import tosa_serializer
    except ImportError as error:
        raise MissingToolError("TOSA programs need Arm's tosa-tools", why=str(error), do=ETHOS_U) from error
    return tosa_serializer


def write_tosa(graph: TosaGraph) -> bytes:
    """The graph as a TOSA 1.0 flatbuffer. Raises MissingToolError without tosa-tools."""
    ts = require_serializer()
    types = {"i8": ts.DType.INT8, "i16": ts.DType.INT16, "i32": ts.DType.INT32}
    serializer = ts.TosaSerializer("", targetMajor=1, targetMinor=0, targetPatch=0, targetDraft=False)
    block = serializer.currRegion.currBasicBlock
    for name, value in graph.values.items():
        if value.type == "shape":
            serializer.addConst([len(graph.constants[name])], ts.DType.SHAPE, graph.constants[name].tolist(), name)
        elif name in graph.constants:
            serializer.addConst(list(value.shape), types[value.type], graph.constants[name], name)
        elif name in graph.inputs:
            tensor = ts.TosaSerializerTensor(name, list(value.shape), types[value.type])
            serializer.addInputTensor(tensor)
        else:
            block.addTensor(name, list(value.shape), types[value.type])
    for name in graph.outputs:
        block.addOutput(name)
    for operator in graph.operators:
        serializer.addOperator(
            getattr(ts.Op, operator.kind), list(operator.inputs), [operator.output], _attribute(ts, operator)
        )
    return bytes(serializer.serialize())


def _attribute(ts: Any, operator: Operator) -> Any:
    attribute, options = ts.TosaSerializerAttribute(), operator.attributes
    match operator.kind:
        case "CONV2D":
            attribute.Conv2dAttribute([0, 0, 0, 0], [1, 1], [1, 1], False, ts.DType.INT32)
        case "RESCALE":
            attribute.RescaleAttribute(True, ts.RoundingMode.SINGLE_ROUND, options["per_channel"], False, False)
        case "REDUCE_SUM":
            attribute.ReduceSumAttribute(options["axis"])
        case "REDUCE_MAX":
            attribute.ReduceMaxAttribute(options["axis"], ts.NanPropagationMode.PROPAGATE)
        case "CONCAT":
            attribute.ConcatAttribute(options["axis"])
        case "TRANSPOSE":
            attribute.TransposeAttribute(options["perms"])
        case "ARITHMETIC_RIGHT_SHIFT":
            attribute.ArithmeticRightShiftAttribute(False)
        case kind:
            names = {"MATMUL": "MatMul", "CLZ": "Clz"}
            getattr(attribute, f"{names.get(kind, kind.title().replace('_', ''))}Attribute")()
    return attribute
