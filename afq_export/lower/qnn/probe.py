"""Runs quantized linears alone on the HTP."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.operand import Operand
from afq_export.lower.probe_input import probe_input
from afq_export.lower.qnn.decoder import StaticGraph
from afq_export.lower.qnn.grids import Stored, quantized
from afq_export.lower.qnn.linears import write_linear
from afq_export.lower.qnn.program import model_of
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.runtime.qnn import HostFile, open_model
from afq_export.spec.target import TargetProfile


def run_linears(
    linears: Sequence[QuantizedLinear],
    inputs: Mapping[str, np.ndarray],
    target: TargetProfile,
    options: HostFile,
    keep: Callable[[bytes], None] = lambda model: None,
) -> dict[str, np.ndarray]:
    """What the HTP gives for `inputs[name]`, float32 [T, I]: float32 [T, O] by name.

    One graph for all of them, given to `keep`; its inputs and outputs are codes. Raises InputError when an input is
    missing or does not fit its linear.
    """
    arrays = {linear.spec.name: probe_input(linear, inputs) for linear in linears}
    made = linears_graph(linears, target, {name: len(array) for name, array in arrays.items()})
    model = model_of(made, target, {}).SerializeToString()
    keep(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "linears.onnx"
        path.write_bytes(model)
        session = open_model(path, options)
        feed = {f"{name}.x": Stored.of(made.grids[f"{name}.x"]).codes(array[None]) for name, array in arrays.items()}
        outputs = [f"{name}.y" for name in arrays]
        found = dict(zip(outputs, session.run(outputs, feed), strict=True))
    return {name: Stored.of(made.grids[f"{name}.y"]).values(found[f"{name}.y"][0]) for name in arrays}


def linears_graph(linears: Sequence[QuantizedLinear], target: TargetProfile, tokens: Mapping[str, int]) -> StaticGraph:
    """Linears side by side: codes `<name>.x` [1, T, I] to codes `<name>.y` [1, T, O]."""
    graph, grids, outputs = OnnxGraph("probe"), {}, {}
    given, taken = {}, {}
    for linear in linears:
        name, record = linear.spec.name, linear.record
        given[f"{name}.x"] = shape = (1, tokens[name], linear.spec.inputs)
        y = write_linear(graph, Operand.of(graph, f"{name}.x", shape), linear, target.kernel(record.kernel))
        grids |= {f"{name}.x": record.input, y.value: record.output}
        outputs[y.value], taken[f"{name}.y"] = f"{name}.y", y.shape
    bits = max(linear.record.input.bits for linear in linears)
    made, every = quantized(graph, grids, outputs, bits)
    return StaticGraph(made, given, taken, every)
