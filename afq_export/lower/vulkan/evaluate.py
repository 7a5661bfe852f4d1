"""What a Vulkan delegate computes, by the meaning of its operators: nothing on this machine runs it.

Operators mean what ExecuTorch's own definitions of them say (backends/vulkan/custom_ops_lib.py,
extension/llm/custom_ops), computed in float32. A device adds in another order and may compute in float16: this is a
reading of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from executorch.backends.vulkan.serialization import vulkan_graph_schema as vk
from torch import Tensor

from afq_export.errors import InputError
from afq_export.lower.executorch.weights import unpack_int4
from afq_export.lower.vulkan.readback import DYNAMIC, WEIGHT_ONLY, VulkanContent
from afq_export.quantize.activations import quantize_tokens
from afq_export.quantize.checkpoint import QuantizedCheckpoint, dequantize

QUANTIZE = "torchao.choose_qparams_affine.default"
ATTENTION = "sdpa_with_kv_cache.default"


class VulkanReader:
    """`logits` of sequences by the operators of the one delegate, in calls of `prefill` tokens.

    What ExecuTorch looks up outside of the delegate, rows of 8 or 32 bits, is taken from the checkpoint.
    """

    def __init__(self, content: VulkanContent, checkpoint: QuantizedCheckpoint, prefill: int) -> None:
        self.graph, self.checkpoint, self.prefill = content.delegates[0], checkpoint, prefill
        self._caches: dict[int, Tensor] = {}

    def logits(self, ids_T: Tensor) -> Tensor:
        """Float32 [T, V] of a sequence that starts at position 0."""
        self._caches, calls, position = {}, [], 0
        for part in ids_T.split(self.prefill):
            calls.append(self._call(part, position))
            position += len(part)
        return torch.cat(calls)

    def _call(self, ids_T: Tensor, position: int) -> Tensor:
        graph = self.graph.graph
        values = {index: self._input(index, ids_T, position) for index in graph.input_ids}
        for call in graph.chain:
            self._run(call, values)
        return values[graph.output_ids[0]][0]

    def _input(self, index: int, ids_T: Tensor, position: int) -> Tensor:
        """Token ids [1, T], the position [1], or token rows [1, T, D] where they are looked up outside."""
        tensor = self.graph.graph.values[index].value
        if len(tensor.dims) == 3:
            return self.checkpoint.embedding().dequantized()[ids_T][None]
        return torch.tensor([position]) if len(tensor.dims) == 1 else ids_T[None]

    def _run(self, call: vk.OperatorCall, values: dict[int, Any]) -> None:
        *given, result = call.args
        if call.name == ATTENTION:
            values[result] = self._attend(
                *(self._get(index, values) for index in given[:3]), *given[3:5], values, given
            )
            return
        arguments = [self._get(index, values) for index in given]
        if call.name == QUANTIZE:
            tokens = quantize_tokens(arguments[0])
            outputs = self.graph.graph.values[result].value.items
            values |= dict(zip(outputs, (tokens.step, tokens.zero_point), strict=True))
            return
        if call.name not in OPERATORS:
            raise InputError("an operator without a meaning here", where="Vulkan delegate", why=call.name)
        value = self.graph.graph.values[result].value
        first = value.items[0] if isinstance(value, vk.ValueList) else result  # of several, the others are statistics
        values[first] = OPERATORS[call.name](*arguments)

    def _get(self, index: int, values: dict[int, Any]) -> Any:
        """A value of this call: computed, or as the file has it."""
        if index in values:
            return values[index]
        value = self.graph.value(index)
        if isinstance(value, vk.ValueList):
            return [self._get(one, values) for one in value.items]
        return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, keys: int, caches: int, values: dict[int, Any], given: list[int]
    ) -> Tensor:
        """Writes k and v [1, T, K, d] at the position and attends to everything up to each token."""
        start, count = self._get(given[5], values), q.shape[1]
        for place, new in ((keys, k), (caches, v)):
            self._caches.setdefault(place, self._get(place, {}).clone())[:, start : start + count] = new
        order, places = torch.arange(self._caches[keys].shape[1]), torch.arange(start, start + count)
        cached = (self._caches[place].transpose(1, 2) for place in (keys, caches))
        seen = order[None] <= places[:, None]
        return F.scaled_dot_product_attention(q.transpose(1, 2), *cached, attn_mask=seen, enable_gqa=True).transpose(
            1, 2
        )


def _linear(x: Tensor, packed: Tensor, scales: Tensor, group: int, bias: Tensor | None) -> Tensor:
    inputs = x.shape[-1]
    codes = unpack_int4(packed.numpy().tobytes(), packed.shape[0], 2 * packed.shape[1])[:, :inputs]
    outputs = codes.shape[0]
    weight = dequantize(torch.from_numpy(codes.copy()), scales[:, :outputs].t(), group)
    return F.linear(x, weight, None if bias is None else bias[:outputs])


def _dynamic(x: Tensor, step: Tensor, zero: Tensor, packed: Tensor, sums: Tensor, *rest: Any) -> Tensor:
    codes = ((x * (1 / step)).round() + zero).clamp(-128, 127)
    return _linear((codes - zero) * step, packed, *rest)


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _rows(packed: Tensor, scales: Tensor, group: int, ids: Tensor, swapped: bool) -> Tensor:
    """Rows of the linears' nibble order (`swapped`), or of the embedding's own."""
    data = packed if swapped else (packed >> 4) | (packed << 4)
    codes = unpack_int4(data.numpy().tobytes(), packed.shape[0], 2 * packed.shape[1])
    return dequantize(torch.from_numpy(codes.copy()), scales, group)[ids]


OPERATORS: dict[str, Callable[..., Any]] = {
    WEIGHT_ONLY: _linear,
    DYNAMIC: _dynamic,
    "et_vk.prepack.default": lambda x: x,
    "et_vk.rms_norm.default": _rms_norm,
    "et_vk.embedding_q4gsw.default": _rows,
    "et_vk.select_as_symint.default": lambda x, dim, index: int(x.select(dim, index)),
    "sym_size.int": lambda x, dim: x.shape[dim],
    "add": lambda x, y: x + y,
    "aten.add.Tensor": lambda x, y, alpha=1: x + alpha * y,
    "aten.sub.Tensor": lambda x, y, alpha=1: x - alpha * y,
    "aten.mul.Tensor": torch.mul,
    "aten.neg.default": torch.neg,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.relu.default": torch.relu,
    "aten.gelu.default": lambda x, approximate: F.gelu(x, approximate=approximate),
    "aten.rsqrt.default": torch.rsqrt,
    "aten.cat.default": torch.cat,
    "aten.view_copy.default": lambda x, shape: x.reshape(shape),
    "aten.unsqueeze_copy.default": torch.unsqueeze,
    "aten.slice_copy.Tensor": lambda x, dim, start, end, step: x[(slice(None),) * dim + (slice(start, end, step),)],
    "aten.embedding.default": lambda weight, ids, *_: F.embedding(ids, weight),
    "aten.arange.start_step": lambda start, end, step, *_: torch.arange(start, end, step),
    "aten.clone.default": lambda x, *_: x,
    "aten.index.Tensor": lambda x, places: x[places[0]],
    "aten.native_layer_norm.default": lambda x, shape, weight, bias, eps: F.layer_norm(x, shape, weight, bias, eps),
}
"""What the delegate is made of; an operator that is not here stops the reading."""
