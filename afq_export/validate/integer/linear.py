"""A quantized linear as its kernel computes it: `Kernel.arithmetic` -> integer model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from afq_export.errors import InputError
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.validate.integer import cmsis_nn, onnxruntime, openvino, qnn, tosa, vulkan, xnnpack

ARITHMETICS: dict[str, Callable[[QuantizedLinear, Tensor], Tensor]] = {
    "xnnpack.dynamic_per_channel": xnnpack.dynamic_per_channel,
    "xnnpack.dynamic_per_group": xnnpack.dynamic_per_group,
    "xnnpack.static_per_channel": xnnpack.static_per_channel,
    "onnxruntime.static_to_float": onnxruntime.static_to_float,
    "onnxruntime.static_requantized": onnxruntime.static_requantized,
    "onnxruntime.dynamic_per_token": onnxruntime.dynamic_per_token,
    "onnxruntime.dynamic_per_block": onnxruntime.dynamic_per_block,
    "onnxruntime.weight_only": onnxruntime.weight_only,
    "qnn.static": qnn.static,
    "openvino.dynamic_per_group": openvino.dynamic_per_group,
    "openvino.weight_only": onnxruntime.weight_only,
    "cmsis_nn.static_per_channel": cmsis_nn.static_per_channel,
    "cmsis_nn.rows": onnxruntime.weight_only,
    "tosa.static": tosa.static,
    "coreml.weight_only": onnxruntime.weight_only,
    "vulkan.weight_only": onnxruntime.weight_only,
    "vulkan.dynamic_per_group": vulkan.dynamic_per_group,
}
"""float32 [T, I] to float32 [T, O]. Adding an arithmetic is adding a function, its line here and its name in
`Kernel.arithmetic`."""


def integer_linear(arithmetic: str, linear: QuantizedLinear, x: Tensor) -> Tensor:
    """What the kernel gives for float32 `x [..., I]`: float32 `[..., O]`. Raises InputError for an unknown name."""
    if arithmetic not in ARITHMETICS:
        known = f"there are {', '.join(ARITHMETICS)}"
        raise InputError("no integer model", where=linear.spec.name, why=f"arithmetic {arithmetic!r}", do=known)
    out = ARITHMETICS[arithmetic](linear, x.reshape(-1, x.shape[-1]))
    return out.view(*x.shape[:-1], out.shape[-1])
