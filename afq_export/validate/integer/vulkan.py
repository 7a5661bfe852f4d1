"""The arithmetic of the Vulkan delegate's linears with int8 inputs, as its operators are defined.

One asymmetric int8 grid per token, found as in XNNPACK; int32 sums of a group, scaled and added: here in float64, on a
device in an order and width of its own. Nothing here runs the kernels: the target allows for what is not known.
"""

from __future__ import annotations

from torch import Tensor

from afq_export.quantize.activations import quantize_tokens
from afq_export.quantize.checkpoint import QuantizedLinear, dequantize


def dynamic_per_group(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """linear_dq8ca_q4gsw: float32 [T, O]. Codes and scaled codes are exact in float64, so one matmul has all sums."""
    tokens = quantize_tokens(x_TI)
    codes_TI = (tokens.codes - tokens.zero_point).double()
    weight_OI = dequantize(linear.codes.double(), linear.scales.double(), linear.spec.weight.group)
    sums_TO = (codes_TI @ weight_OI.t()) * tokens.step.double()
    return (sums_TO if linear.bias is None else sums_TO + linear.bias.double()).float()
