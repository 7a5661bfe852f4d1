"""Reads the Vulkan delegates of a program: their operators in order, their constants, the integers in them."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from executorch.backends.vulkan.serialization import vulkan_graph_schema as vk
from executorch.backends.vulkan.serialization.vulkan_graph_serialize import VulkanDelegateHeader, flatbuffer_to_vk_graph

from afq_export.errors import InputError
from afq_export.lower.executorch.readback import Outline, read_outline
from afq_export.lower.executorch.weights import unpack_int4
from afq_export.lower.stored import StoredLinear

BACKEND = "VulkanBackend"
WEIGHT_ONLY, DYNAMIC = "et_vk.linear_q4gsw.default", "et_vk.linear_dq8ca_q4gsw.default"
ARGUMENTS = {
    WEIGHT_ONLY: ("x", "weight", "scales", "group", "bias"),
    DYNAMIC: ("x", "input_scale", "input_zero", "weight", "sums", "scales", "group", "bias"),
}
"""Operator of a quantized linear -> what it takes, in order; its result comes last."""
FLOAT_LINEARS = ("aten.linear.default", "aten.mm.default", "aten.addmm.default", "aten.bmm.default")
"""Operators that a linear becomes when its pattern is not recognised."""
PADDED_INPUTS = 8
"""Rows of codes are padded to a multiple of this."""
_TYPES = {
    vk.VkDataType.BOOL: np.bool_,
    vk.VkDataType.UINT8: np.uint8,
    vk.VkDataType.INT8: np.int8,
    vk.VkDataType.INT32: np.int32,
    vk.VkDataType.FLOAT16: np.float16,
    vk.VkDataType.FLOAT32: np.float32,
    vk.VkDataType.INT64: np.int64,
}


@dataclasses.dataclass(frozen=True)
class VulkanGraph:
    """One delegate: its calls in order, and its values, constants among them."""

    graph: vk.VkGraph
    raw: bytes = dataclasses.field(repr=False)
    named: dict[str, bytes] = dataclasses.field(repr=False)

    def value(self, index: int) -> Any:
        """A number, a list, None, or the array of a constant tensor; a VkTensor for one that is computed."""
        value = self.graph.values[index].value
        match value:
            case vk.VkTensor() if value.constant_id >= 0:
                return self._constant(value)
            case vk.Null():
                return None
            case vk.Int():
                return value.int_val
            case vk.Bool():
                return value.bool_val
            case vk.Double():
                return value.double_val
            case vk.String():
                return value.string_val
            case vk.IntList() | vk.BoolList() | vk.DoubleList():
                return list(value.items)
        return value

    def linears(self) -> Iterator[StoredLinear]:
        """The integer linears in running order."""
        for call in self.graph.chain:
            if call.name in ARGUMENTS:
                yield self._linear(call.name, call.args)

    def _linear(self, name: str, args: Sequence[int]) -> StoredLinear:
        given = dict(zip(ARGUMENTS[name], args, strict=False))
        packed, scales, bias = (self.value(given[part]) for part in ("weight", "scales", "bias"))
        inputs = self._inputs(given["x"])
        outputs = self.graph.values[args[-1]].value.dims[-1]
        codes = unpack_int4(packed.tobytes(), packed.shape[0], 2 * packed.shape[1])[:outputs, :inputs]
        if "sums" in given:
            self._check_sums(codes, self.value(given["sums"]), self.value(given["group"]))
        stored = np.ascontiguousarray(scales[:, :outputs].T)
        return StoredLinear(name, codes, stored, None if bias is None else bias[:outputs])

    def _inputs(self, index: int) -> int:
        return self.graph.values[index].value.dims[-1]

    @staticmethod
    def _check_sums(codes: np.ndarray, sums: np.ndarray, group: int) -> None:
        """The kernel takes an input's zero point off by these sums: they must be those of the codes."""
        expected = codes.reshape(codes.shape[0], -1, group).sum(-1, dtype=np.int32).T
        if not np.array_equal(sums[:, : codes.shape[0]], expected):
            raise InputError("the sums of a weight's codes are not theirs")

    def _constant(self, tensor: vk.VkTensor) -> np.ndarray:
        stored = self.graph.constants[tensor.constant_id]
        data = self.named[stored.named_key] if stored.named_key else self.raw[stored.offset :][: stored.length]
        return np.frombuffer(data, _TYPES[tensor.datatype], int(np.prod(tensor.dims))).reshape(tensor.dims)


@dataclasses.dataclass(frozen=True)
class VulkanContent:
    """A program's Vulkan delegates in order, and what ExecuTorch runs outside them."""

    delegates: tuple[VulkanGraph, ...]
    outline: Outline

    @functools.cached_property
    def linears(self) -> list[StoredLinear]:
        """Of all delegates, in running order."""
        return [linear for delegate in self.delegates for linear in delegate.linears()]

    @functools.cached_property
    def operators(self) -> dict[str, int]:
        """How often the delegates call each operator."""
        counts: dict[str, int] = {}
        for delegate in self.delegates:
            for call in delegate.graph.chain:
                counts[call.name] = counts.get(call.name, 0) + 1
        return counts

    def constants(self) -> Iterator[np.ndarray]:
        """Every constant tensor of the delegates."""
        for delegate in self.delegates:
            for index, value in enumerate(delegate.graph.values):
                if isinstance(value.value, vk.VkTensor) and value.value.constant_id >= 0:
                    yield delegate.value(index)


def read_vulkan(pte: bytes) -> VulkanContent:
    """The content of a program. Raises InputError when it has no Vulkan delegate, or one that this cannot decode."""
    outline = read_outline(pte)
    try:
        delegates = tuple(
            _delegate(delegate.data, outline.constants) for delegate in outline.delegates if delegate.backend == BACKEND
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError("not a Vulkan program of this package", why=str(error)) from error
    if not delegates:
        raise InputError("not a Vulkan program of this package", why="it has no Vulkan delegate")
    return VulkanContent(delegates, outline)


def _delegate(data: bytes, named: dict[str, bytes]) -> VulkanGraph:
    header = VulkanDelegateHeader.from_bytes(data[: VulkanDelegateHeader.EXPECTED_LENGTH])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ExecuTorch's way to its own schema
        graph = flatbuffer_to_vk_graph(data[header.flatbuffer_offset :][: header.flatbuffer_size])
    return VulkanGraph(graph, data[header.bytes_offset :][: header.bytes_size], named)
