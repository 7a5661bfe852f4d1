"""An OpenVINO graph under construction, with the interface of the ONNX one, so that its writers fill either.

Nodes are asked for by their ONNX operator and written as OpenVINO's; only what the writers use exists here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import openvino
from openvino import Node, Output
from openvino import opset15 as ops

from afq_export.errors import InputError
from afq_export.lower.onnx.graph import OnnxGraph

ELEMENTS = {1: "f32", 2: "u8", 3: "i8", 6: "i32", 7: "i64", 9: "boolean"}
"""ONNX's number of an element type -> OpenVINO's name."""


class OpenvinoGraph(OnnxGraph):
    """`values` are OpenVINO's, by the names that the writers pass around; `sinks` are assignments to the state."""

    def __init__(self, scope: str = "model") -> None:
        super().__init__(scope)
        self.values: dict[str, Output] = {}
        self.parameters: list[Node] = []
        self.variables: dict[str, openvino.op.util.Variable] = {}
        self.sinks: list[Node] = []

    def parameter(self, name: str, shape: tuple[int | str, ...], element: type[np.integer]) -> str:
        """An input called `name`; sizes that are names are dynamic."""
        sizes = openvino.PartialShape([-1 if isinstance(size, str) else size for size in shape])
        node = ops.parameter(sizes, openvino.Type(element))
        node.set_friendly_name(name)
        node.output(0).set_names({name})
        self.parameters.append(node)
        self._taken.add(name)
        self.values[name] = node.output(0)
        return name

    def nodes_of(self, operator: str, inputs: list[str], names: list[str], **attributes: Any) -> list[str]:
        """Appends what OpenVINO has for an ONNX operator with one result. Raises InputError when it is not known."""
        if operator not in OPERATORS or len(names) != 1:
            raise InputError("no OpenVINO form of an operator", where=names[0], why=operator)
        return [self.add(OPERATORS[operator](*(self.values[name] for name in inputs), **attributes), names[0])]

    def add(self, node: Node, name: str) -> str:
        """Takes the one result of an OpenVINO node under a name that begins with `name`."""
        unique = self._unique(name)
        node.set_friendly_name(unique)
        self.values[unique] = node.output(0)
        return unique

    def tensor(self, name: str, array: np.ndarray) -> str:
        """A constant called `name`. The same name twice is the same constant."""
        if name not in self.values:
            self._taken.add(name)
            node = constant_of(array)
            node.set_friendly_name(name)
            self.values[name] = node.output(0)
        return name

    def model(self, outputs: dict[str, str], name: str) -> openvino.Model:
        """The finished model; `outputs` are value names by the name of the result."""
        results = []
        for output, value in outputs.items():
            result = ops.result(self.values[value])
            result.set_friendly_name(output)
            self.values[value].add_names({output})
            results.append(result)
        return openvino.Model(results, self.sinks, self.parameters, name)


def constant_of(array: np.ndarray) -> Node:
    """A constant of `array`; int4 codes become OpenVINO's i4, the first of two in the low bits."""
    if array.dtype != ml_dtypes.int4:
        return ops.constant(np.asarray(array, order="C"))
    nibbles = array.astype(np.int8).view(np.uint8).reshape(-1) & 15
    tensor = openvino.Tensor(openvino.Type.i4, openvino.Shape(array.shape))
    tensor.data[...] = (nibbles[0::2] | nibbles[1::2] << 4).reshape(tensor.data.shape)
    return ops.constant(tensor)


def _reduced(reduce: Callable[..., Node]) -> Callable[..., Node]:
    return lambda x, axes, keepdims=1: reduce(x, axes, keep_dims=bool(keepdims))


OPERATORS: dict[str, Callable[..., Node]] = {
    "Add": ops.add,
    "And": ops.logical_and,
    "BitShift": lambda x, by, direction: ops.bitwise_right_shift(x, by),
    "BitwiseAnd": ops.bitwise_and,
    "BitwiseXor": ops.bitwise_xor,
    "Cast": lambda x, to: ops.convert(x, ELEMENTS[to]),
    "Concat": lambda *xs, axis: ops.concat(list(xs), axis),
    "CumSum": ops.cum_sum,
    "Gather": lambda x, indices, axis=0: ops.gather(x, indices, ops.constant(np.int64(axis))),
    "Gelu": lambda x, approximate: ops.gelu(x, "ERF" if approximate == "none" else "TANH"),
    "LessOrEqual": ops.less_equal,
    "Mul": ops.multiply,
    "Range": lambda start, stop, step: ops.range(start, stop, step, "i64"),
    "Relu": ops.relu,
    "Reshape": lambda x, sizes: ops.reshape(x, sizes, special_zero=True),
    "Shape": lambda x: ops.shape_of(x, "i64"),
    "Sigmoid": ops.sigmoid,
    "Slice": lambda x, start, stop, axis: ops.slice(x, start, stop, ops.constant(np.array([1], np.int64)), axis),
    "Sub": ops.subtract,
    "Transpose": lambda x, perm: ops.transpose(x, ops.constant(np.array(perm, np.int64))),
    "Unsqueeze": ops.unsqueeze,
    "Where": ops.select,
}
"""ONNX operator, of which the writers pass the attributes named here -> what makes OpenVINO's."""
