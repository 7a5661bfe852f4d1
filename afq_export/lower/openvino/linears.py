"""One quantized linear as OpenVINO nodes: the pattern that its plugins keep compressed.

    Constant i4 or i8 [O, I], or [O, G, g]  ->  Convert f32  ->  Multiply by the scales  ->  Reshape [O, I]  ->  MatMul

The MatMul carries the linear's name. Whether activations are quantized is a property of the session
(DYNAMIC_QUANTIZATION_GROUP_SIZE), of which the file's operators say nothing.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from openvino import opset15 as ops
from torch import Tensor

from afq_export.errors import InputError
from afq_export.lower.openvino.graph import OpenvinoGraph
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.spec.target import Kernel

STORED = {4: ml_dtypes.int4, 8: np.int8}
"""Bits of a stored code -> its type in the file."""
ARITHMETICS = ("openvino.dynamic_per_group", "openvino.weight_only")
"""What this pattern can be run as."""


def write_linear(graph: OpenvinoGraph, x: str, linear: QuantizedLinear, kernel: Kernel) -> str:
    """Appends a linear on the float32 value `x` [.., I]; returns the float32 value [.., O].

    Raises InputError for a kernel that OpenVINO lacks.
    """
    if kernel.arithmetic not in ARITHMETICS:
        raise InputError("OpenVINO has no such kernel", where=linear.spec.name, why=kernel.name)
    name, values = linear.spec.name, graph.values
    weight = write_weight(graph, name, linear.codes, linear.scales, linear.spec.weight.group, kernel.stored_bits)
    y = graph.add(ops.matmul(values[x], values[weight], False, True), name)
    if linear.bias is None:
        return y
    bias = values[graph.tensor(f"{name}.bias", linear.bias.float().numpy())]
    return graph.add(ops.add(values[y], bias), f"{name}.biased")


def write_weight(
    graph: OpenvinoGraph, name: str, codes_OI: Tensor, scales_OG: Tensor, group: int, stored_bits: int
) -> str:
    """float32 [O, I] of codes and scales, which lie in the file as `name`.codes and .scales; written once."""

    def write() -> str:
        codes = codes_OI.numpy().reshape(len(codes_OI), -1, group or codes_OI.shape[1])
        scales = scales_OG.float().numpy()[..., None]
        if not group:
            codes, scales = codes[:, 0], scales[:, 0]
        values = graph.values
        stored = graph.tensor(f"{name}.codes", codes.astype(STORED[stored_bits]))
        floats = graph.add(ops.convert(values[stored], "f32"), f"{name}.values")
        scaled = ops.multiply(values[floats], values[graph.tensor(f"{name}.scales", scales)])
        weight = graph.add(scaled, f"{name}.weight")
        if not group:
            return weight
        rows = values[graph.integers(*codes_OI.shape)]
        return graph.add(ops.reshape(values[weight], rows, special_zero=False), f"{name}.rows")

    return graph.once(("weight", name), write)
