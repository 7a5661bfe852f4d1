"""Linears alone as TOSA programs, on Arm's reference model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from afq_export.lower.tosa.decoder import write_linear
from afq_export.lower.tosa.file import write_tosa
from afq_export.lower.tosa.graph import TosaGraph
from afq_export.lower.tosa.operand import Operand
from afq_export.quantize.activations import quantize_static
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.runtime.tosa import reference_model
from afq_export.validate.integer.dot import input_grid, output_grid


def run_linears(linears: Sequence[QuantizedLinear], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Float32 inputs [T, I] by name, put on the stored grids -> float32 outputs [T, O] by name.

    All linears are one program. Raises MissingToolError without the reference model.
    """
    graph = TosaGraph()
    steps: dict[str, Operand] = {}
    for linear in linears:
        name, grid = linear.spec.name, input_grid(linear)
        with graph.part(name):
            value = graph.input(f"in.{name}", "i8", (1, *inputs[name].shape))
            y = write_linear(linear, Operand(graph, value, grid.scale, grid.zero_point), output_grid(linear))
            steps[name] = y
            graph.output(y.value, f"out.{name}")
    codes = {
        f"in.{linear.spec.name}": quantize_static(
            torch.from_numpy(np.ascontiguousarray(inputs[linear.spec.name])), input_grid(linear)
        )
        .numpy()
        .astype(np.int8)[None]
        for linear in linears
    }
    found = reference_model(write_tosa(graph), tuple(graph.inputs), tuple(graph.outputs))(codes)
    return {
        name: ((torch.from_numpy(found[f"out.{name}"][0].astype(np.int64)) - y.zero).float() * y.scale).numpy()
        for name, y in steps.items()
    }
