"""Reads a finished ONNX file back: which integers are really in it, found by following the graph from each MatMul."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from afq_export.errors import InputError
from afq_export.lower.onnx.hadamard import online_product
from afq_export.lower.onnx.linears import MIDDLE
from afq_export.lower.stored import StoredLinear
from afq_export.quantize.activations import LEAST_LARGEST
from afq_export.quantize.checkpoint import StaticRange

INTEGER = {8: "MatMulInteger", 4: "MatMulInteger on int4 inputs"}
"""Bits of a MatMulInteger's activations -> what its linear is called here."""

Read = TypeVar("Read")


class WhenAsked(Mapping[str, Read]):
    """A mapping whose values are read anew each time: a file's tensors are never all in memory."""

    def __init__(self, read: Mapping[str, Callable[[], Read]]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> Read:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


@dataclasses.dataclass(frozen=True)
class OnnxContent:
    """`linears` by name; how often every operator stands in the file; all tensors by name.

    Linears and tensors are read when asked for. A linear in another pattern than linears.py writes is an InputError.
    """

    linears: Mapping[str, StoredLinear]
    operators: dict[str, int]
    tensors: Mapping[str, np.ndarray]
    metadata: dict[str, str]
    opset: int


def read_onnx(path: Path) -> OnnxContent:
    """Content of the file at `path` and its external data. Raises InputError when it is no whole ONNX model."""
    try:
        model = onnx.load(path, load_external_data=False)
        _check_external(model, path.parent)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError("cannot read the ONNX file", where=str(path), why=str(error)) from error
    if not model.graph.node:
        raise InputError("not an ONNX model", where=str(path), why="it has no node")
    return read_model(model, path.parent)


def _check_external(model: ModelProto, folder: Path) -> None:
    """Raises OSError or ValueError unless every tensor that lies beside the file is there in full."""
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            size = (folder / info.location).stat().st_size
            if (info.offset or 0) + (info.length or 0) > size:
                raise ValueError(f"{info.location} ends within {tensor.name}")


def read_model(model: ModelProto, folder: Path | None = None) -> OnnxContent:
    """Content of a model in memory; `folder` has the tensors that are not in it."""
    reader = _Reader(model, folder)
    linears = {
        node.name: functools.partial(reader.linear, node)
        for node in model.graph.node
        if _operator(node) in ("MatMul", "MatMulInteger")
    }
    return OnnxContent(
        linears=WhenAsked(linears),
        operators=dict(collections.Counter(_operator(node) for node in model.graph.node)),
        tensors=WhenAsked({name: functools.partial(reader.array, name) for name in reader.initializers}),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        opset=next((entry.version for entry in model.opset_import if not entry.domain), 0),
    )


def _operator(node: NodeProto) -> str:
    """The operator, or what hadamard.py calls a product that is no linear."""
    return (online_product(node.input[1]) if node.op_type == "MatMul" else "") or node.op_type


class _Reader:
    """Who gives and who takes each value of a graph."""

    def __init__(self, model: ModelProto, folder: Path | None) -> None:
        self.folder = "" if folder is None else str(folder)
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers: dict[str, NodeProto] = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = collections.defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.consumers[name].append(node)

    def array(self, name: str) -> np.ndarray:
        """An initializer's values. Raises InputError when `name` is a value that is computed."""
        if name not in self.initializers:
            raise InputError("a number of a linear is computed, not stored", where=name)
        return numpy_helper.to_array(self.initializers[name], self.folder)

    def linear(self, node: NodeProto) -> StoredLinear:
        """The linear whose product `node` is. Raises InputError when the pattern is not one that we write."""
        return self._dynamic(node) if node.op_type == "MatMulInteger" else self._dequantized(node)

    def _dynamic(self, node: NodeProto) -> StoredLinear:
        codes = self.array(node.input[1])
        middle = int(self.array(node.input[2])) if len(node.input) > 2 else 0
        if middle != MIDDLE or len(node.input) > 3:
            raise InputError("a MatMulInteger with other zero points", where=node.name)
        step, bits = self._token_step(node)
        sums = self._follower(node.output[0], ("Cast",))
        stepped = self._follower(sums.output[0], ("Mul",)) if sums else None
        scaled = self._follower(stepped.output[0], ("Mul",)) if stepped and step in stepped.input else None
        scales = [self.array(name) for name in scaled.input if name in self.initializers] if scaled else []
        if scaled is None or not scales:
            raise InputError("a MatMulInteger without scales", where=node.name)
        grids = dict(weight="int8 per_channel", activation=f"int{bits} per_token dynamic")
        return StoredLinear(INTEGER[bits], _turned(codes), scales[0][:, None], self._bias(scaled.output[0]), **grids)

    def _token_step(self, node: NodeProto) -> tuple[str, int]:
        """The value that holds the steps of a MatMulInteger's input, whose codes must be made as linears.py does, and
        the bits of its grid."""
        shifted = self._producer(node.input[0], "Cast")
        rounded = self._producer(shifted.input[0], "Add")
        steps = self._producer(self._producer(rounded.input[0], "Round").input[0], "Div")
        step = self._producer(steps.input[1], "Div")
        least = self._producer(step.input[0], "Max")
        source = self._producer(self._producer(least.input[0], "ReduceMax").input[0], "Abs").input[0]
        numbers = [float(self.array(name)) for name in (rounded.input[1], step.input[1], least.input[1])]
        bits = next((bits for bits in INTEGER if numbers == [MIDDLE, (1 << (bits - 1)) - 1, LEAST_LARGEST]), 0)
        if not bits or source != steps.input[0]:
            raise InputError("a MatMulInteger on another grid", where=node.name, why=f"its numbers are {numbers}")
        return step.output[0], bits

    def _producer(self, value: str, operator: str) -> NodeProto:
        """The node that gives `value`. Raises InputError when it is no `operator`."""
        producer = self.producers.get(value)
        if producer is None or producer.op_type != operator:
            raise InputError(
                "not a pattern that this package writes", where=value, why=f"it does not come from {operator}"
            )
        return producer

    def _dequantized(self, node: NodeProto) -> StoredLinear:
        weight = self.producers.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            raise InputError("a float MatMul", where=node.name, why="its weight is not quantized")
        codes, scales, *zeros = (self.array(name) for name in weight.input)
        if any(zero.astype(np.int32).any() for zero in zeros):
            raise InputError("weights with zero points", where=node.name)
        attributes = {attribute.name: attribute.i for attribute in weight.attribute}
        block = attributes.get("block_size", 0)
        if attributes.get("axis") != (0 if block else 1):
            raise InputError("weights with scales along the other axis", where=node.name)
        kind = f"{codes.dtype}{' in blocks of ' + str(block) if block else ''}"
        scales = scales.T if block else scales[:, None]
        source, y, target = self.producers.get(node.input[0]), node.output[0], None
        follower = self._follower(y, ("QuantizeLinear",))
        if follower is not None and self._is_output_grid(node):
            target = self._grid(follower)
        static = self._grid(source) if source is not None and source.op_type == "DequantizeLinear" else None
        grids = dict(
            weight=f"{codes.dtype} {f'g{block}' if block else 'per_channel'}",
            activation="int8 static" if static else "as the session says",
        )
        return StoredLinear(kind, _turned(codes), scales, self._bias(y), static, target, **grids)

    def _is_output_grid(self, node: NodeProto) -> bool:
        """Whether the QuantizeLinear behind a product is its own: named after it, not after the next linear's input."""
        return any(follower.name.startswith(f"{node.name}.output") for follower in self.consumers[node.output[0]])

    def _grid(self, node: NodeProto) -> StaticRange:
        """The grid of a QuantizeLinear or DequantizeLinear, which must be that of its other half."""
        if node.op_type == "QuantizeLinear":
            other = self._follower(node.output[0], ("DequantizeLinear",))
        else:
            other = self._producer(node.input[0], "QuantizeLinear")
        scale, zero_point = numbers = [self.array(name) for name in node.input[1:3]]
        if other is None or [self.array(name) for name in other.input[1:3]] != numbers:
            raise InputError("quantized on one grid and dequantized on another", where=node.name)
        return StaticRange(float(scale), int(zero_point) - MIDDLE)

    def _bias(self, y: str) -> np.ndarray | None:
        """The stored vector that is added to `y`, if one is."""
        follower = self._follower(y, ("Add",))
        stored = [] if follower is None else [name for name in follower.input if name in self.initializers]
        return self.array(stored[0]) if stored else None

    def _follower(self, value: str, operators: tuple[str, ...]) -> NodeProto | None:
        """The one node that takes `value`, if it is among `operators`."""
        followers = self.consumers[value]
        return followers[0] if len(followers) == 1 and followers[0].op_type in operators else None


def _turned(codes_IO: np.ndarray) -> np.ndarray:
    """Codes int8 [O, I], in one piece: what is compared with them lies so too. NumPy's own copy takes five times as
    long."""
    return torch.from_numpy(codes_IO.astype(np.int8)).T.contiguous().numpy()
