"""The arithmetic of ONNX Runtime's CPU kernels for our quantized linears, exactly where it is one chain of roundings.

    function            operator that the runtime executes    the output is
    static_to_float     MatMulIntegerToFloat                  fl(fl(acc) * fl(sx * ws)) + b
    static_requantized  QLinearMatMul                         a code: rint(fl(acc) * fl(fl(sx * ws) / sy)) + zy
    dynamic_per_token   MatMulInteger, between our own nodes  fl(fl(fl(acc) * step) * ws) + b
    dynamic_per_block   MatMulNBits, accuracy level 4         sum over groups of step_g * ws_g * dot_g, + b
    weight_only         MatMulNBits, accuracy level 0         x . (ws * code) + b

acc and dot are int32, fl() rounds to float32, rint() half to even; every `+ b` is a float32 addition of its own. The
first three are equal to the runtime bit for bit. The last two add float32 numbers in an order that depends on the
instruction set: here the sums are in float64, and the target states how far the runtime may be off.

Dynamic_per_block is what the runtime computes, not what the file says: in the file a float input meets dequantized
weights (weight_only), and the session's accuracy level makes the runtime quantize that input to int8 as well.

In the file activations are uint8, every code and zero point 128 higher: ONNX Runtime has fast kernels on x86 for those
only. It changes no sum, so the models are in int8 like the checkpoint. Source: measured on ONNX Runtime 1.31.1, and
compared with it by tests/validate/test_onnxruntime_runtime.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afq_export.errors import InputError
from afq_export.quantize.activations import dequantize_static, quantize_dynamic
from afq_export.quantize.checkpoint import QuantizedLinear, StaticRange, dequantize
from afq_export.spec.quant import QuantSpec
from afq_export.validate.integer.dot import QMAX, QMIN, check_range, dot, input_grid, output_grid


def static_to_float(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """An int8 input on a stored grid, a float32 output [T, O]."""
    return _biased(linear, _sums(linear, x_TI).float() * _product_scales(linear))


def static_requantized(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """Input and output on stored grids; dequantized float32 [T, O].

    Raises InputError for a linear with a bias: the runtime would take MatMulIntegerToFloat instead, add the bias in
    float32 and quantize the sum.
    """
    if linear.bias is not None:
        raise InputError("QLinearMatMul takes no bias", where=linear.spec.name)
    grid = output_grid(linear)
    requantization_O = _product_scales(linear) / _float32(grid.scale)
    return dequantize_static(_rounded(_sums(linear, x_TI).float() * requantization_O, grid), grid)


def dynamic_per_token(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """One symmetric grid per token: float32 [T, O]."""
    tokens = quantize_dynamic(x_TI, _activation(linear))
    return _biased(linear, dot(tokens.codes, linear.codes).float() * tokens.step * linear.scales[:, 0])


def dynamic_per_block(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """One symmetric grid per token and group of inputs, groups summed in float64: float32 [T, O].

    Scaled codes are exact in float64, and what their products round there (2^-53) is far below the float32 result: one
    matmul stands for the groups' int32 dot products, scaled and added.
    """
    spec = linear.spec.weight
    blocks = quantize_dynamic(x_TI, _activation(linear))
    check_range(torch.tensor(float(spec.group * QMAX * abs(spec.qmin))))
    x_TI = (blocks.codes.double() * blocks.step.double()).flatten(1)[:, : blocks.width]
    return _float_product(linear, x_TI, dequantize(linear.codes.double(), linear.scales.double(), spec.group))


def weight_only(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """Float input times weights dequantized to float32, summed in float64: float32 [T, O]."""
    return _float_product(linear, x_TI.double(), linear.dequantized().double())


def quantize_by_division(x: Tensor, grid: StaticRange) -> Tensor:
    """int8 codes as whole float32, as QuantizeLinear makes them: one division, rounded to even, saturated."""
    return _rounded(x / _float32(grid.scale), grid)


def _rounded(steps: Tensor, grid: StaticRange) -> Tensor:
    return (steps.round() + grid.zero_point).clamp(QMIN, QMAX)


def _sums(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """The int32 accumulators of a static kernel, in float64."""
    grid = input_grid(linear)
    return dot(quantize_by_division(x_TI, grid) - grid.zero_point, linear.codes)


def _product_scales(linear: QuantizedLinear) -> Tensor:
    """The float32 value of one unit of the accumulator, [O]."""
    return _float32(input_grid(linear).scale) * linear.scales[:, 0]


def _float_product(linear: QuantizedLinear, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """A float64 matmul with the bias inside, rounded once: the runtime starts its float32 sums from the bias."""
    sums_TO = x_TI @ weight_OI.t()
    return (sums_TO if linear.bias is None else sums_TO + linear.bias.double()).float()


def _activation(linear: QuantizedLinear) -> QuantSpec:
    if linear.spec.activation is None:
        raise InputError(
            "no dynamic activation grid", where=linear.spec.name, do="use a recipe with dynamic activations"
        )
    return linear.spec.activation


def _biased(linear: QuantizedLinear, y_TO: Tensor) -> Tensor:
    return y_TO if linear.bias is None else y_TO + linear.bias


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
