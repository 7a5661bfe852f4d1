"""One quantized linear as ONNX nodes: the pattern that ONNX Runtime turns into its integer kernel.

    kernel                nodes                                                         becomes
    MatMulIntegerToFloat  QuantizeLinear, DequantizeLinear, MatMul                      the same, one integer kernel
    QLinearMatMul         ... and QuantizeLinear, DequantizeLinear behind it            the same
    MatMulInteger         Div by the token's step, Round, Cast, MatMulInteger, Mul      as it stands
    MatMulInteger-a4      the same, on codes of -7 to 7                                 as it stands
    MatMulNBits           DequantizeLinear in blocks along the inputs, MatMul           the same

Weights lie [I, O] in the file, codes as the checkpoint's. The MatMul carries the linear's name, which is how a profile
of the runtime says what ran. Activation codes are stored as uint8, zero point 128 higher: the same integers, and the
only form in which ONNX Runtime 1.31 keeps the integer kernel when linears share their input, and has a fast one.
Weight zero points of 0 are written for 8-bit codes: without them ONNX Runtime writes its own under
`session.x64quantprecision`, with a shape that it then refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from onnx import TensorProto

from afq_export.errors import InputError
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.quantize.activations import LEAST_LARGEST
from afq_export.quantize.checkpoint import QuantizedLinear, StaticRange
from afq_export.spec.quant import LinearSpec
from afq_export.spec.target import Kernel

MIDDLE = 128
"""What is added to an int8 code to store it as uint8."""

STORED = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}
"""Bits of a stored code -> its type in the file."""


def write_linear(graph: OnnxGraph, x: str, linear: QuantizedLinear, kernel: Kernel, zero_points: bool = False) -> str:
    """Appends a linear on the float32 value `x` [.., I]; returns the float32 value [.., O].

    `zero_points`: weight zero points of 0 are written out. Raises InputError for a kernel that this runtime lacks.
    """
    write = WRITERS.get(kernel.arithmetic)
    if write is None:
        raise InputError("ONNX Runtime has no such kernel", where=linear.spec.name, why=kernel.name)
    return write(graph, x, linear, kernel, zero_points)


def _static(graph: OnnxGraph, x: str, linear: QuantizedLinear, kernel: Kernel, zero_points: bool) -> str:
    """MatMulIntegerToFloat, and QLinearMatMul when the output has a grid too."""
    name, record = linear.spec.name, linear.record
    if record.input is None:
        raise InputError("a static linear needs the range of its input", where=name)
    x = _through_grid(graph, x, record.input, f"{x}.input")
    scales = graph.tensor(f"{name}.scales", linear.scales[:, 0].float().numpy())
    weight = graph.node(
        "DequantizeLinear",
        [_codes(graph, linear, kernel), scales, _zeros(graph, linear, kernel)],
        f"{name}.weight",
        axis=1,
    )
    y = graph.node("MatMul", [x, weight], name)
    if record.output is None:
        return _biased(graph, y, linear)
    if linear.bias is not None:
        raise InputError("QLinearMatMul takes no bias", where=name, why="with one ONNX Runtime adds it in float")
    return _through_grid(graph, y, record.output, f"{name}.output")


def _dynamic_per_token(graph: OnnxGraph, x: str, linear: QuantizedLinear, kernel: Kernel, zero_points: bool) -> str:
    """MatMulInteger, one symmetric grid per token; linears with the same input and bits share its codes.

    Codes of 4 bits stand in the same bytes as those of 8: the runtime has no narrower product.
    """
    name = linear.spec.name
    if linear.spec.activation is None:
        raise InputError("no dynamic activation grid", where=name, do="use a recipe with dynamic activations")
    codes, step = _token_codes(graph, x, linear.spec.activation.qmax)
    middle = graph.constant(np.array(MIDDLE, np.uint8), "zero_point")
    sums = graph.node("MatMulInteger", [codes, _codes(graph, linear, kernel), middle], name)
    y = graph.node("Cast", [sums], f"{name}.sums", to=TensorProto.FLOAT)
    y = graph.node("Mul", [y, step], f"{name}.steps")
    y = graph.node("Mul", [y, graph.tensor(f"{name}.scales", linear.scales[:, 0].float().numpy())], f"{name}.scaled")
    return _biased(graph, y, linear)


def _blockwise(graph: OnnxGraph, x: str, linear: QuantizedLinear, kernel: Kernel, zero_points: bool) -> str:
    """MatMulNBits: scales [G, O] along the inputs; whether activations are quantized is the session's option."""
    name = linear.spec.name
    scales = graph.tensor(f"{name}.scales", np.ascontiguousarray(stored_scales(linear, kernel).T))
    inputs, group = [_codes(graph, linear, kernel), scales], stored_group(linear.spec, kernel)
    if zero_points or kernel.stored_bits == 8:
        inputs.append(_zeros(graph, linear, kernel))
    weight = graph.node("DequantizeLinear", inputs, f"{name}.weight", axis=0, block_size=group)
    return _biased(graph, graph.node("MatMul", [x, weight], name), linear)


WRITERS: dict[str, Callable[[OnnxGraph, str, QuantizedLinear, Kernel, bool], str]] = {
    "onnxruntime.static_to_float": _static,
    "onnxruntime.static_requantized": _static,
    "onnxruntime.dynamic_per_token": _dynamic_per_token,
    "onnxruntime.dynamic_per_block": _blockwise,
    "onnxruntime.weight_only": _blockwise,
}
"""`Kernel.arithmetic` -> what writes it."""


def stored_group(spec: LinearSpec, kernel: Kernel) -> int:
    """Inputs that share a scale in the file; 0: all of a row."""
    return spec.weight.group or kernel.scale_group


def stored_scales(linear: QuantizedLinear, kernel: Kernel) -> np.ndarray:
    """Scales float32 [O, G] as in the file: a row's one scale repeated where the operator has groups only."""
    scales = linear.scales.float().numpy()
    if linear.spec.weight.group or not kernel.scale_group:
        return scales
    return scales.repeat(-(-linear.spec.inputs // kernel.scale_group), axis=1)


def _codes(graph: OnnxGraph, linear: QuantizedLinear, kernel: Kernel) -> str:
    """The codes [I, O] in the type that the kernel stores."""
    codes = linear.codes.T.contiguous().numpy()  # NumPy's transposed copy takes five times as long
    return graph.tensor(f"{linear.spec.name}.codes", codes.astype(STORED[kernel.stored_bits]))


def _zeros(graph: OnnxGraph, linear: QuantizedLinear, kernel: Kernel) -> str:
    """Zero points in the shape of the scales and the type of the codes."""
    blocks = stored_group(linear.spec, kernel)
    shape = tuple(reversed(stored_scales(linear, kernel).shape)) if blocks else (len(linear.scales),)
    return graph.tensor(f"{linear.spec.name}.zero_points", np.zeros(shape, STORED[kernel.stored_bits]))


def _biased(graph: OnnxGraph, y: str, linear: QuantizedLinear) -> str:
    if linear.bias is None:
        return y
    name = linear.spec.name
    return graph.node("Add", [y, graph.tensor(f"{name}.bias", linear.bias.float().numpy())], f"{name}.biased")


def _through_grid(graph: OnnxGraph, x: str, grid: StaticRange, name: str) -> str:
    """`x` on a stored grid and back; the same value on the same grid is written once."""
    scale = graph.constant(np.array(grid.scale, np.float32), "scale")
    zero_point = graph.constant(np.array(grid.zero_point + MIDDLE, np.uint8), "zero_point")

    def write() -> str:
        codes = graph.node("QuantizeLinear", [x, scale, zero_point], f"{name}.codes")
        return graph.node("DequantizeLinear", [codes, scale, zero_point], name)

    return graph.once(("grid", x, scale, zero_point), write)


def _token_codes(graph: OnnxGraph, x: str, qmax: int) -> tuple[str, str]:
    """uint8 codes of `x` on a symmetric grid per token up to `qmax`, and the steps [.., 1]:
    `activations.quantize_symmetric`."""

    def write() -> tuple[str, str]:
        absolute = graph.node("Abs", [x], f"{x}.abs")
        largest = graph.node("ReduceMax", [absolute, graph.integers(-1)], f"{x}.largest", keepdims=1)
        floor = graph.constant(np.array(LEAST_LARGEST, np.float32), "least")
        largest = graph.node("Max", [largest, floor], f"{x}.range")
        step = graph.node("Div", [largest, graph.constant(np.array(qmax, np.float32), "qmax")], f"{x}.step")
        rounded = graph.node("Round", [graph.node("Div", [x, step], f"{x}.steps")], f"{x}.rounded")
        shifted = graph.node("Add", [rounded, graph.constant(np.array(MIDDLE, np.float32), "middle")], f"{x}.shifted")
        return graph.node("Cast", [shifted], f"{x}.codes", to=TensorProto.UINT8), step

    return graph.once(("tokens", x, qmax), write)
