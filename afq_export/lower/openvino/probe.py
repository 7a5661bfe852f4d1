"""Runs quantized linears alone through OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import openvino

from afq_export.lower.onnx.decoder import BATCH, SEQUENCE
from afq_export.lower.openvino.graph import OpenvinoGraph
from afq_export.lower.openvino.linears import write_linear
from afq_export.lower.probe_input import probe_input
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.runtime.openvino import RunOptions, compiled
from afq_export.spec.target import TargetProfile


def run_linears(
    linears: Sequence[QuantizedLinear],
    inputs: Mapping[str, np.ndarray],
    target: TargetProfile,
    options: RunOptions,
) -> dict[str, np.ndarray]:
    """What the kernel of each linear gives for `inputs[name]`, float32 [T, I]: float32 [T, O] by name.

    One model for all of them. Raises InputError when an input is missing or does not fit its linear.
    """
    arrays = {f"{linear.spec.name}.x": probe_input(linear, inputs)[None] for linear in linears}
    results = compiled(linears_model(linears, target), options)(arrays)
    return {linear.spec.name: results[f"{linear.spec.name}.y"][0].copy() for linear in linears}


def linears_model(linears: Sequence[QuantizedLinear], target: TargetProfile) -> openvino.Model:
    """A model of linears side by side: `<name>.x` [batch, sequence, I] to `<name>.y` [batch, sequence, O]."""
    graph, outputs = OpenvinoGraph("probe"), {}
    for linear in linears:
        x = graph.parameter(f"{linear.spec.name}.x", (BATCH, SEQUENCE, linear.spec.inputs), np.float32)
        outputs[f"{linear.spec.name}.y"] = write_linear(graph, x, linear, target.kernel(linear.record.kernel))
    return graph.model(outputs, "linears")
