"""Reads a package back: its operations, its constants, and which integers are really in it.

Only the protobuf schema is Apple's; blobs are decoded here, from the layout of MILBlob/Blob/StorageFormat.hpp in
coremltools: at a value's offset stands a header of 64 bytes (sentinel, type, bytes, offset of the data).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from coremltools.proto import MIL_pb2, Model_pb2
from google.protobuf.message import DecodeError

from afq_export.errors import InputError
from afq_export.lower.coreml.package import MODEL, WEIGHTS
from afq_export.lower.stored import StoredLinear

DEQUANTIZE = "constexpr_blockwise_shift_scale"
SENTINEL = 0xDEADBEEF
_HEADER = struct.Struct("<IIQQ")
_TYPES: dict[int, Any] = {
    MIL_pb2.BOOL: np.bool_,
    MIL_pb2.STRING: np.str_,
    MIL_pb2.FLOAT16: np.float16,
    MIL_pb2.FLOAT32: np.float32,
    MIL_pb2.INT4: ml_dtypes.int4,
    MIL_pb2.INT8: np.int8,
    MIL_pb2.INT32: np.int32,
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation: its kind, what it takes (names of values, or constants), and the names of its results."""

    kind: str
    inputs: dict[str, tuple[str | np.ndarray, ...]]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Content:
    """A package: its operations in order, constants by name, states with their shapes, its inputs and outputs."""

    operations: tuple[Operation, ...]
    constants: dict[str, np.ndarray] = dataclasses.field(repr=False)
    states: dict[str, tuple[int, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    prefill: int
    opset: str

    def constant(self, operation: Operation, name: str) -> np.ndarray | None:
        """An input that is a constant; None when the operation has no such input."""
        given = operation.inputs.get(name)
        if given is None:
            return None
        return self.constants[given[0]] if isinstance(given[0], str) else given[0]

    def quantized(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Name of a dequantized constant -> codes int8 [O, I], scales [O, G] as they are stored."""
        found = {}
        for operation in self.operations:
            if operation.kind == DEQUANTIZE:
                if "offset" in operation.inputs:
                    raise InputError("a weight with a zero point", where=operation.outputs[0])
                codes, scales = self.constant(operation, "data"), self.constant(operation, "scale")
                found[operation.outputs[0]] = (codes.astype(np.int8), scales)
        return found

    def linears(self) -> Iterator[tuple[str, StoredLinear]]:
        """The integer linears in running order, by the names of their values. A bias that is not asked for is 0."""
        quantized = self.quantized()
        for operation in self.operations:
            if operation.kind == "linear" and operation.inputs["weight"][0] in quantized:
                codes, scales = quantized[operation.inputs["weight"][0]]
                data = next(o for o in self.operations if o.outputs == operation.inputs["weight"])
                bits = 4 if self.constant(data, "data").dtype == ml_dtypes.int4 else 8
                bias = self.constant(operation, "bias")
                yield operation.outputs[0], StoredLinear(f"int{bits}", codes, scales, bias)


def read_package(package: Path) -> Content:
    """The content of an .mlpackage. Raises InputError when it is not one, or holds what this cannot decode."""
    try:
        model = Model_pb2.Model.FromString((package / MODEL).read_bytes())
        blob = (package / WEIGHTS).read_bytes()
        function = model.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        constants: dict[str, np.ndarray] = {}
        operations = []
        for operation in block.operations:
            if operation.type == "const":
                constants[operation.outputs[0].name] = _value(operation.attributes["val"], blob)
            else:
                operations.append(_operation(operation, blob))
        ranges = model.description.input[0].type.multiArrayType.shapeRange.sizeRanges
        return Content(
            operations=tuple(operations),
            constants=constants,
            states={s.name: tuple(s.type.stateType.arrayType.shape) for s in model.description.state},
            inputs=tuple(one.name for one in model.description.input),
            outputs=tuple(one.name for one in model.description.output),
            prefill=ranges[1].upperBound,
            opset=function.opset,
        )
    except OSError as error:
        raise InputError("cannot read a Core ML package", where=str(package), why=error.strerror or "") from error
    except (DecodeError, KeyError, IndexError, ValueError, struct.error) as error:
        raise InputError("not a Core ML package of this package", where=str(package), why=str(error)) from error


def _operation(operation: Any, blob: bytes) -> Operation:
    inputs = {
        name: tuple(_value(one.value, blob) if one.HasField("value") else one.name for one in argument.arguments)
        for name, argument in operation.inputs.items()
    }
    return Operation(operation.type, inputs, tuple(output.name for output in operation.outputs))


def _value(value: Any, blob: bytes) -> np.ndarray:
    """A constant, from the program itself or from the file of weights."""
    tensor = value.type.tensorType
    kind = _TYPES[tensor.dataType]
    shape = tuple(int(dimension.constant.size) for dimension in tensor.dimensions)
    if value.HasField("blobFileValue"):
        return _blob(blob, value.blobFileValue.offset, kind, shape)
    content = value.immediateValue.tensor
    stored = getattr(content, content.WhichOneof("value")).values
    if content.WhichOneof("value") == "bytes":
        return np.frombuffer(stored, kind).reshape(shape)
    return np.array(list(stored), kind).reshape(shape)


def _blob(blob: bytes, offset: int, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the file of weights; two 4-bit numbers a byte, the first in the low half."""
    sentinel, _, size, start = _HEADER.unpack_from(blob, offset)
    if sentinel != SENTINEL:
        raise ValueError(f"no tensor at byte {offset} of the weights")
    data = np.frombuffer(blob, np.uint8, size, start)
    if kind is not ml_dtypes.int4:
        return data.view(kind).reshape(shape)
    nibbles = np.stack((data & 0xF, data >> 4), axis=-1).reshape(-1)[: int(np.prod(shape))].astype(np.int8)
    return ((nibbles ^ 8) - 8).astype(ml_dtypes.int4).reshape(shape)
