"""Small OpenVINO models of linears, written operator by operator and run by its CPU plugin: the other side of the
comparison.

Nothing here comes from afq_export.lower, so that a mistake there cannot hide behind itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import openvino
import torch
from openvino import opset15 as ops
from torch import Tensor

from afq_export.quantize.checkpoint import LinearRecord, QuantizedLinear
from afq_export.spec.quant import Granularity, LinearSpec, QuantSpec

DYNAMIC = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
    "INFERENCE_NUM_THREADS": "1",
}
FLOAT = DYNAMIC | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def linear_of(
    arithmetic: str,
    outputs: int = 24,
    inputs: int = 64,
    *,
    name: str = "blocks.0.q_proj",
    bits: int = 4,
    group: int = 0,
    bias: bool = True,
    seed: int = 0,
) -> QuantizedLinear:
    """A linear with random codes for `openvino.<arithmetic>`; scales give outputs of order one."""
    random = torch.Generator().manual_seed(seed)
    weight = QuantSpec(bits, Granularity.PER_GROUP if group else Granularity.PER_CHANNEL, group=group)
    dynamic = QuantSpec(8, Granularity.PER_GROUP, group=32, dynamic=True)
    spec = LinearSpec(name, outputs, inputs, bias, weight, dynamic if arithmetic == "dynamic_per_group" else None)
    codes = torch.randint(weight.qmin, weight.qmax + 1, (outputs, inputs), dtype=torch.int8, generator=random)
    scales = 2.0 / (weight.qmax * inputs**0.5) * (0.5 + torch.rand(outputs, spec.groups, generator=random))
    return QuantizedLinear(
        LinearRecord(spec, arithmetic), codes, scales, torch.randn(outputs, generator=random) if bias else None
    )


class Program:
    """Linears side by side, compiled once."""

    def __init__(self, linears: Sequence[QuantizedLinear], properties: Mapping[str, str]) -> None:
        self.linears = linears
        self._program = openvino.Core().compile_model(model_of(linears), "CPU", dict(properties))

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The plugin's outputs [T, O] for `inputs` [T, I]."""
        found = self._program([x.numpy()[None] for x in inputs])
        return [torch.from_numpy(found[place][0].copy()) for place in range(len(self.linears))]


def run(linear: QuantizedLinear, x: Tensor, properties: Mapping[str, str]) -> Tensor:
    """The plugin's output [T, O] of one linear for `x` [T, I]."""
    return Program([linear], properties)([x])[0]


def model_of(linears: Sequence[QuantizedLinear]) -> openvino.Model:
    """Linears side by side."""
    parameters, results = [], []
    for linear in linears:
        x = ops.parameter([-1, -1, linear.spec.inputs], np.float32)
        y = ops.matmul(x, weight_of(linear), False, True)
        parameters.append(x)
        results.append(y if linear.bias is None else ops.add(y, ops.constant(linear.bias.numpy())))
    return openvino.Model(results, parameters, "linears")


def weight_of(linear: QuantizedLinear) -> openvino.Node:
    """The decompressed weight [O, I]; codes of 4 bits or fewer are stored as i4."""
    outputs, inputs = linear.codes.shape
    group = linear.spec.weight.group or inputs
    stored = ops.constant(linear.codes.numpy().reshape(outputs, -1, group))
    if linear.spec.weight.bits <= 4:
        low, high = linear.codes.flatten()[0::2], linear.codes.flatten()[1::2]
        packed = openvino.Tensor(openvino.Type.i4, openvino.Shape([outputs, inputs // group, group]))
        packed.data[...] = ((low & 15) | (high << 4)).numpy().astype(np.int8).reshape(packed.data.shape)
        stored = ops.constant(packed)
    scaled = ops.multiply(ops.convert(stored, "f32"), ops.constant(linear.scales.numpy()[..., None]))
    return ops.reshape(scaled, ops.constant(np.array([outputs, inputs])), False)
