"""One linear's weight as ONNX nodes that the QNN provider turns into a quantized tensor.

    per channel       DequantizeLinear(codes [I, O], scales [O], axis=1)
    in groups, LPBQ   QuantizeLinear and DequantizeLinear(weights float32 [I, O], axis=0, block_size=g) with the scales
                      DequantizeLinear(steps uint8 [G, O], scales [O], axis=1): whole multiples of one float per output

The provider knows LPBQ only where the file holds the float weights: they are code * scale, exactly, and give the same
codes when the provider quantizes them. The compiled context holds the codes alone.

What stands in front of it and behind it lies on grids like everything else (grids.py).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from afq_export.errors import InputError
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.operand import Operand
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.quantize.grid import block_steps
from afq_export.spec.target import Kernel

STORED = {4: ml_dtypes.int4, 8: np.int8}
"""Bits of a stored weight code -> its type in the file."""


def write_linear(graph: OnnxGraph, x: Operand, linear: QuantizedLinear, kernel: Kernel) -> Operand:
    """Appends weight and product; the result [.., O] is float and has no grid yet. Raises InputError with a bias."""
    name, group = linear.spec.name, linear.spec.weight.group
    if linear.bias is not None:
        raise InputError("the kernel takes no bias", where=name, why=kernel.name)
    dtype = STORED[kernel.stored_bits]
    weight = f"{name}.weight"
    if group:
        values = graph.tensor(f"{name}.values", np.ascontiguousarray(linear.dequantized().numpy().T))
        steps, unit = block_steps(linear.scales)
        inputs = [
            graph.tensor(f"{name}.steps", np.ascontiguousarray(steps.numpy().T)),
            graph.tensor(f"{name}.scales", unit[:, 0].numpy()),
        ]
        scales = graph.node("DequantizeLinear", inputs, f"{name}.blocks", axis=1)
        zeros = graph.tensor(f"{name}.zero_points", np.zeros(tuple(reversed(linear.scales.shape)), dtype))
        blocks: dict[str, int] = dict(axis=0, block_size=group)
        codes = graph.node("QuantizeLinear", [values, scales, zeros], f"{name}.codes", **blocks)
        # Not the node again: ONNX Runtime would give either taker a copy, and leave one of them on the CPU.
        whole = graph.tensor(f"{name}.block_scales", np.ascontiguousarray(linear.scales.float().numpy().T))
        weight = graph.node("DequantizeLinear", [codes, whole, zeros], weight, **blocks)
    else:
        codes = graph.tensor(f"{name}.codes", np.ascontiguousarray(linear.codes.numpy().T).astype(dtype))
        scales = graph.tensor(f"{name}.scales", linear.scales[:, 0].float().numpy())
        zeros = graph.tensor(f"{name}.zero_points", np.zeros(len(linear.scales), dtype))
        weight = graph.node("DequantizeLinear", [codes, scales, zeros], weight, axis=1)
    y = graph.node("MatMul", [x.as_stored(x.shape), weight], name)
    return Operand.of(graph, y, (*x.shape[:-1], linear.spec.outputs))
