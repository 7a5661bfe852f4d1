"""Small ONNX models of linears, written operator by operator and run by ONNX Runtime: the other side of the comparison.

Nothing here comes from afq_export.lower, so that a mistake there cannot hide behind itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from afq_export.quantize.checkpoint import LinearRecord, QuantizedLinear, StaticRange
from afq_export.runtime.onnxruntime import RunOptions, open_session
from afq_export.runtime.profile import executed
from afq_export.spec.quant import Granularity, LinearSpec, QuantSpec

SESSION = {
    "graph_optimization_level": "all",
    "session.x64quantprecision": "1",
    "session.qdq_matmulnbits_accuracy_level": "4",
}
LEVEL_0 = SESSION | {"session.qdq_matmulnbits_accuracy_level": "0"}
STORED = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}
INPUT, OUTPUT = StaticRange(scale=0.0317, zero_point=-7), StaticRange(scale=0.0529, zero_point=11)


def linear_of(
    arithmetic: str,
    outputs: int = 24,
    inputs: int = 64,
    *,
    name: str = "blocks.0.q_proj",
    bits: int = 8,
    input_bits: int = 8,
    group: int = 32,
    bias: bool = True,
    seed: int = 0,
) -> QuantizedLinear:
    """A linear with random codes for `onnxruntime.<arithmetic>`; scales give outputs of order one.

    `bias` is for kernels that take one: static_requantized has none.
    """
    bias = bias and arithmetic != "static_requantized"
    random = torch.Generator().manual_seed(seed)
    blocked, static = arithmetic in ("dynamic_per_block", "weight_only"), arithmetic.startswith("static")
    where = Granularity.PER_GROUP if blocked else Granularity.PER_CHANNEL
    weight = QuantSpec(bits, where, group=group if blocked else 0)
    activation = {
        "dynamic_per_token": QuantSpec(input_bits, Granularity.PER_TOKEN, dynamic=True),
        "dynamic_per_block": QuantSpec(8, Granularity.PER_GROUP, group=group, dynamic=True),
        "weight_only": None,
    }.get(arithmetic, QuantSpec(8, Granularity.PER_TENSOR, symmetric=False))
    spec = LinearSpec(name, outputs, inputs, bias, weight, activation)
    codes = torch.randint(weight.qmin, weight.qmax + 1, (outputs, inputs), dtype=torch.int8, generator=random)
    scales = 2.0 / (weight.qmax * inputs**0.5) * (0.5 + torch.rand(outputs, spec.groups, generator=random))
    grids = {"input": INPUT if static else None, "output": OUTPUT if arithmetic == "static_requantized" else None}
    record = LinearRecord(spec, arithmetic, **grids)
    return QuantizedLinear(record, codes, scales, torch.randn(outputs, generator=random) if bias else None)


def with_grids(linear: QuantizedLinear, **grids: StaticRange) -> QuantizedLinear:
    """`linear` with another `input` or `output`."""
    return dataclasses.replace(linear, record=msgspec.structs.replace(linear.record, **grids))


class Program:
    """Linears side by side in one model with dynamic [batch, sequence, I]; those with the same input share its nodes.

    `zero_points`: weight zero points of 0 are written out, in 8 bits. `stored` are the bits of a code in the file, else
    the grid's own.
    """

    def __init__(
        self, linears: Sequence[QuantizedLinear], *, zero_points: bool = True, stored: int = 0, shared: bool = False
    ) -> None:
        self.linears, self.zero_points, self.stored, self.shared = linears, zero_points, stored, shared
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self.inputs = {f"{linear.spec.name}.x": linear.spec.inputs for linear in linears}
        if shared:
            self.inputs = {"x": linears[0].spec.inputs}
        self.outputs = {self._linear(linear): linear.spec.outputs for linear in linears}

    def model(self) -> bytes:
        """The checked model."""
        values = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", size]) for name, size in v]
            for v in (self.inputs.items(), self.outputs.items())
        ]
        graph = helper.make_graph(self.nodes, "linears", *values, list(self.tensors.values()))
        two_bits = any(t.data_type == TensorProto.INT2 for t in graph.initializer)
        opset, ir_version = (25, 13) if two_bits else (23, 11)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()

    def feeds(self, inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """`inputs` [.., I], one per linear (one in all when shared), as [1, T, I] unless they have three dimensions."""
        arrays = [x.numpy() if x.ndim == 3 else x.numpy()[None] for x in inputs]
        return dict(zip(self.inputs, arrays, strict=True))

    def run(self, inputs: Sequence[Tensor], session: Mapping[str, str] = SESSION) -> list[Tensor]:
        """The runtime's outputs in the shape of their inputs."""
        found = open_session(self.model(), RunOptions(session)).run(list(self.outputs), self.feeds(inputs))
        shapes = [x.shape[:-1] for x in inputs] * (len(found) if self.shared else 1)
        return [torch.from_numpy(y).view(*shape, -1) for y, shape in zip(found, shapes, strict=True)]

    def operators(self, inputs: Sequence[Tensor], folder: Path, session: Mapping[str, str] = SESSION) -> dict[str, str]:
        """Node name -> operator that the runtime executed."""
        runtime = open_session(self.model(), RunOptions(session), profile=folder / "profile")
        runtime.run(None, self.feeds(inputs))
        return executed(Path(runtime.end_profiling()).read_text(encoding="utf-8"))

    def _linear(self, linear: QuantizedLinear) -> str:
        name = linear.spec.name
        x = "x" if self.shared else f"{name}.x"
        write = {"dynamic_per_token": self._per_token, "static_to_float": self._static}
        y = write.get(linear.record.kernel, self._static if linear.record.input else self._blockwise)(x, linear)
        if linear.bias is not None:
            y = self._node("Add", [y, self._tensor(f"{name}.bias", linear.bias.numpy())], f"{name}.biased")
        return y if linear.record.output is None else self._through_grid(y, linear.record.output, f"{name}.output")

    def _static(self, x: str, linear: QuantizedLinear) -> str:
        name = linear.spec.name
        scales = self._tensor(f"{name}.scales", linear.scales[:, 0].numpy())
        inputs = [self._codes(linear), scales, *self._zeros(linear)]
        weight = self._node("DequantizeLinear", inputs, f"{name}.weight", axis=1)
        return self._node("MatMul", [self._through_grid(x, linear.record.input, f"{x}.input"), weight], name)

    def _blockwise(self, x: str, linear: QuantizedLinear) -> str:
        name, group = linear.spec.name, linear.spec.weight.group
        scales = self._tensor(f"{name}.scales", np.ascontiguousarray(linear.scales.numpy().T))
        inputs = [self._codes(linear), scales, *self._zeros(linear)]
        weight = self._node("DequantizeLinear", inputs, f"{name}.weight", axis=0, block_size=group)
        return self._node("MatMul", [x, weight], name)

    def _per_token(self, x: str, linear: QuantizedLinear) -> str:
        """The nodes around MatMulInteger. Codes are uint8 with zero point 128."""
        name, middle = linear.spec.name, self._tensor("middle", np.array(128, np.uint8))
        largest = self._node("Abs", [x], f"{x}.abs")
        largest = self._node("ReduceMax", [largest, self._tensor("axes", np.array([-1]))], f"{x}.largest", keepdims=1)
        largest = self._node("Max", [largest, self._tensor("least", np.array(2.0**-90, np.float32))], f"{x}.range")
        qmax = {8: 127, 4: 7}[linear.spec.activation.bits]
        step = self._node("Div", [largest, self._tensor(f"{x}.qmax", np.array(qmax, np.float32))], f"{x}.step")
        codes = self._node("Round", [self._node("Div", [x, step], f"{x}.steps")], f"{x}.rounded")
        codes = self._node("Add", [codes, self._tensor("offset", np.array(128, np.float32))], f"{x}.shifted")
        codes = self._node("Cast", [codes], f"{x}.codes", to=TensorProto.UINT8)
        inputs = [codes, self._codes(linear), middle, *self._zeros(linear)]
        y = self._node("Cast", [self._node("MatMulInteger", inputs, name)], f"{name}.sums", to=TensorProto.FLOAT)
        y = self._node("Mul", [y, step], f"{name}.steps")
        return self._node("Mul", [y, self._tensor(f"{name}.scales", linear.scales[:, 0].numpy())], f"{name}.scaled")

    def _through_grid(self, x: str, grid: StaticRange, name: str) -> str:
        """Onto a stored grid and back, in uint8: int8 codes and zero point 128 higher."""
        scale = self._tensor(f"{name}.scale", np.array(grid.scale, np.float32))
        zero_point = self._tensor(f"{name}.zero_point", np.array(grid.zero_point + 128, np.uint8))
        codes = self._node("QuantizeLinear", [x, scale, zero_point], f"{name}.codes")
        return self._node("DequantizeLinear", [codes, scale, zero_point], f"{name}.values")

    def _codes(self, linear: QuantizedLinear) -> str:
        codes = np.ascontiguousarray(linear.codes.numpy().T)
        return self._tensor(f"{linear.spec.name}.codes", codes.astype(self._type(linear)))

    def _zeros(self, linear: QuantizedLinear) -> list[str]:
        """Zero points in the shape of the scales; nothing when they are not written out."""
        if not self.zero_points:
            return []
        shape = linear.scales.shape[::-1] if linear.spec.weight.group else (linear.spec.outputs,)
        return [self._tensor(f"{linear.spec.name}.zeros", np.zeros(shape, self._type(linear)))]

    def _type(self, linear: QuantizedLinear) -> type:
        static = linear.record.input is not None or linear.record.kernel == "dynamic_per_token"
        return STORED[self.stored or (8 if static else linear.spec.weight.bits)]

    def _node(self, operator: str, inputs: list[str], name: str, **attributes: object) -> str:
        """Appends a node unless there is one of the name; returns the name of its result, which is its own."""
        if name not in (node.name for node in self.nodes):
            self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def _tensor(self, name: str, array: np.ndarray) -> str:
        self.tensors[name] = numpy_helper.from_array(array, name)
        return name
