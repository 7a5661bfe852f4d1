"""Small models of single operators or linears, for comparison: the same nodes as the program's, run alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto, helper

from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.operand import Shape
from afq_export.runtime.onnxruntime import RunOptions, open_session


def part_model(
    graph: OnnxGraph,
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    opset: int,
    integers: Sequence[str] = (),
) -> bytes:
    """The bytes of a model of `graph`; inputs in `integers` are int64, all else is float32."""
    ends = [
        [
            helper.make_tensor_value_info(name, TensorProto.INT64 if name in integers else TensorProto.FLOAT, shape)
            for name, shape in side.items()
        ]
        for side in (inputs, outputs)
    ]
    made = helper.make_graph(graph.nodes, "part", *ends, initializer=list(graph.initializers.values()))
    imports = [helper.make_opsetid("", opset)]
    ir = helper.find_min_ir_version_for(imports)
    return helper.make_model(made, opset_imports=imports, ir_version=ir).SerializeToString()


class Part:
    """A small model, loaded; called with arrays by name, it gives its results in order."""

    def __init__(self, model: bytes, options: RunOptions) -> None:
        self._session = open_session(model, options)

    def __call__(self, **arrays: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {name: np.ascontiguousarray(array) for name, array in arrays.items()})
