"""Reads what stands in a delegate's bytes: its linears, to the bit.

`flatc --json`, which ExecuTorch itself uses, prints floats with six decimals, so the tables are read here directly.
Slots are a field's place in `backends/xnnpack/serialization/schema.fbs` (a union takes two: its type, its table).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import numpy as np
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNDatatype
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from flatbuffers import number_types as number
from flatbuffers.encode import Get
from flatbuffers.packer import uoffset
from flatbuffers.table import Table

_FULLY_CONNECTED = 2
_QUANTIZED = 2


class GridKind(enum.IntEnum):
    """Members of the schema's union XNNQuantParams."""

    PER_CHANNEL = 1
    PER_TENSOR = 2
    PER_TOKEN = 3
    PER_GROUP = 4


class Record:
    """One table of the file."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def integer(self, slot: int, kind: Any = number.Uint32Flags) -> int:
        """A number; 0 when the file leaves it out."""
        return self._number(slot, kind, 0)

    def real(self, slot: int) -> float:
        """A float32."""
        return self._number(slot, number.Float32Flags, 0.0)

    def text(self, slot: int) -> str:
        """A string; empty when absent."""
        offset = self._offset(slot)
        return self._table.String(offset + self._table.Pos).decode() if offset else ""

    def record(self, slot: int) -> Record:
        """A nested table, or the table of a union. Raises ValueError when absent."""
        offset = self._offset(slot)
        if not offset:
            raise ValueError(f"no table at slot {slot}")
        return Record(Table(self._table.Bytes, self._table.Indirect(offset + self._table.Pos)))

    def records(self, slot: int) -> list[Record]:
        """A vector of tables."""
        offset = self._offset(slot)
        if not offset:
            return []
        start, count = self._table.Vector(offset), self._table.VectorLen(offset)
        places = range(start, start + 4 * count, 4)
        return [Record(Table(self._table.Bytes, self._table.Indirect(place))) for place in places]

    def integers(self, slot: int) -> list[int]:
        """A vector of uint32."""
        offset = self._offset(slot)
        if not offset:
            return []
        start, count = self._table.Vector(offset), self._table.VectorLen(offset)
        return np.frombuffer(self._table.Bytes, "<u4", count, start).tolist()

    def _offset(self, slot: int) -> int:
        return self._table.Offset(4 + 2 * slot)

    def _number(self, slot: int, kind: Any, default: Any) -> Any:
        offset = self._offset(slot)
        return self._table.Get(kind, offset + self._table.Pos) if offset else default


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of a delegate. `data` and `scales` name constants; `scale` and `zero_point` are a stored int8 grid."""

    dtype: XNNDatatype
    shape: tuple[int, ...]
    data: str = ""
    scales: str = ""
    group: int = 0
    scale: float = 0.0
    zero_point: int = 0


@dataclasses.dataclass(frozen=True)
class FullyConnected:
    """A linear node of a delegate and the tensors it joins."""

    handle: int
    input: Value
    weight: Value
    bias: Value | None
    output: Value


def fully_connected(program: bytes) -> Iterator[FullyConnected]:
    """The linear nodes of one delegate, in the order in which they run. Raises ValueError for other bytes."""
    header = XNNHeader.from_bytes(program[: XNNHeader.EXPECTED_LENGTH])
    data = program[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
    graph = Record(Table(data, Get(uoffset, data, 0)))
    keys = [constant.text(2) for constant in graph.records(8)]
    values = [_value(value, keys) for value in graph.records(2)]
    for node in graph.records(1):
        if node.integer(0, number.Uint8Flags) == _FULLY_CONNECTED:
            given, weight, bias, result = (node.record(1).integer(slot) for slot in range(4))
            yield FullyConnected(
                handle=node.integer(2),
                input=values[given],
                weight=values[weight],
                bias=values[bias] if bias < len(values) else None,
                output=values[result],
            )


def _value(value: Record, keys: list[str]) -> Value:
    quantized = value.integer(0, number.Uint8Flags) == _QUANTIZED
    union = value.record(1)
    tensor = union.record(0) if quantized else union
    shape, data = tuple(tensor.integers(2)), keys[tensor.integer(3)]
    dtype = XNNDatatype(tensor.integer(0, number.Int16Flags))
    match union.integer(1, number.Uint8Flags) if quantized else 0:
        case GridKind.PER_CHANNEL:
            return Value(dtype, shape, data, scales=keys[union.record(2).integer(2)])
        case GridKind.PER_GROUP:
            grid = union.record(2)
            return Value(dtype, shape, data, scales=keys[grid.integer(4)], group=grid.integer(2, number.Int32Flags))
        case GridKind.PER_TENSOR:
            grid = union.record(2)
            return Value(dtype, shape, data, scale=grid.real(0), zero_point=grid.integer(1, number.Int32Flags))
    return Value(dtype, shape, data)
