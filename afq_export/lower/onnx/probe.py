"""Runs quantized linears alone through ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from afq_export.lower.onnx.decoder import BATCH, SEQUENCE
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.linears import write_linear
from afq_export.lower.onnx.parts import Part, part_model
from afq_export.lower.probe_input import probe_input
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.runtime.onnxruntime import RunOptions
from afq_export.spec.target import TargetProfile


def run_linears(
    linears: Sequence[QuantizedLinear],
    inputs: Mapping[str, np.ndarray],
    target: TargetProfile,
    options: RunOptions,
    keep: Callable[[bytes], None] = lambda model: None,
) -> dict[str, np.ndarray]:
    """What the kernel of each linear gives for `inputs[name]`, float32 [T, I]: float32 [T, O] by name.

    One model for all of them, given to `keep`. Raises InputError when an input is missing or does not fit its linear.
    """
    arrays = {f"{linear.spec.name}.x": probe_input(linear, inputs)[None] for linear in linears}
    model = linears_model(linears, target)
    keep(model)
    results = Part(model, options)(**arrays)
    return {linear.spec.name: result[0] for linear, result in zip(linears, results, strict=True)}


def linears_model(linears: Sequence[QuantizedLinear], target: TargetProfile) -> bytes:
    """A model of linears side by side: `<name>.x` [batch, sequence, I] to `<name>.y` [batch, sequence, O]."""
    graph = OnnxGraph("probe")
    given, taken = {}, {}
    for linear in linears:
        name = linear.spec.name
        given[f"{name}.x"], taken[f"{name}.y"] = (
            (BATCH, SEQUENCE, linear.spec.inputs),
            (BATCH, SEQUENCE, linear.spec.outputs),
        )
        kernel = target.kernel(linear.record.kernel)
        y = write_linear(graph, f"{name}.x", linear, kernel, target.onnx.explicit_zero_points)
        graph.node("Identity", [y], f"{name}.y")
    opset = max(target.onnx.opset, *(target.kernel(linear.record.kernel).opset for linear in linears))
    return part_model(graph, given, taken, opset)
