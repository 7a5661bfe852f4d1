"""A finished graph with the result of every operator among its outputs, and what each operator is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from afq_export.lower.qnn.grids import MOVERS, Stored


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator between its grids. `kind` says what it is in a report: products with a weight, and of two tensors,
    are told apart. `codes` is the value that holds its result's codes, `inputs` its dequantized inputs, `sources` the
    codes behind those, `constants` its stored inputs that are no floats."""

    operator: str
    kind: str
    codes: str
    grid: Stored
    inputs: tuple[str, ...]
    sources: tuple[str, ...]
    constants: tuple[np.ndarray, ...]
    attributes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ShownGraph:
    """`model` is a file's bytes; `outputs` all that it gives; `steps` in running order."""

    model: bytes
    outputs: tuple[str, ...]
    steps: tuple[Operator, ...]
    reader: _Values

    def value(self, name: str, codes: Mapping[str, np.ndarray]) -> np.ndarray:
        """float64 of a dequantized value."""
        return self.reader.value(name, codes)


def shown_graph(path: Path) -> ShownGraph:
    """The graph at `path`. What only moves codes is not shown: behind an output it would leave the HTP."""
    model = onnx.load(path)
    reader, graph = _Values(model), model.graph
    activations = [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in reader.tensors]
    steps = [_operator(node, reader) for node in activations]
    there = {value.name for value in graph.output}
    for step in steps:
        if step.kind not in MOVERS and step.codes not in there:
            dtype = helper.np_dtype_to_tensor_dtype(step.grid.zero_point.dtype)
            graph.output.append(helper.make_tensor_value_info(step.codes, dtype, None))
    return ShownGraph(model.SerializeToString(), tuple(value.name for value in graph.output), tuple(steps), reader)


def _operator(quantize: NodeProto, reader: _Values) -> Operator:
    node = reader.producers[quantize.input[0]]
    grid = reader.grid(quantize)
    if node.op_type == "DequantizeLinear":
        return Operator("QuantizeLinear", "QuantizeLinear", quantize.output[0], grid, (node.output[0],), (), (), {})
    kind = node.op_type
    if kind == "MatMul":
        weight = reader.producers[node.input[1]].input[0]
        stored = weight in reader.tensors or reader.producers[weight].input[0] in reader.tensors
        kind = "MatMul with a weight" if stored else "MatMul of two tensors"
    sources = tuple(reader.producers[name].input[0] for name in node.input if name in reader.producers)
    constants = tuple(reader.array(name) for name in node.input if name in reader.tensors)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return Operator(node.op_type, kind, quantize.output[0], grid, tuple(node.input), sources, constants, attributes)


class _Values:
    """Stored tensors, and what a DequantizeLinear makes of codes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.tensors[name])

    def grid(self, node: NodeProto) -> Stored:
        return Stored(self.array(node.input[1]), self.array(node.input[2]))

    def value(self, name: str, codes: Mapping[str, np.ndarray]) -> np.ndarray:
        """float64; weights in blocks are stored as such."""
        node = self.producers[name]
        source, scale = node.input[0], node.input[1]
        if source in self.producers and self.producers[source].input[0] in self.tensors:
            return self.array(self.producers[source].input[0]).astype(np.float64)
        whole = self.array(source) if source in self.tensors else codes[source]
        scales = self.array(scale).astype(np.float64) if scale in self.tensors else self.value(scale, codes)
        zero = self.array(node.input[2]).astype(np.float64) if len(node.input) > 2 else 0.0
        return (whole.astype(np.float64) - zero) * scales
