"""Files in ONNX Runtime's own format, written so that the same model gives the same bytes.

The format is a flatbuffer: `InferenceSession {ort_version, model, -, kernel_type_str_resolver}`. ONNX Runtime writes
back to front: the model, then the resolver (which types each kernel is registered for), then the root. It visits the
resolver's entries in the order of a hash table that is seeded anew in every process, so their places differ between two
runs although what they say does not. The model's part is always the same; it is kept as it is, and the part in front of
it is written again, in the order of the keys.

Source: onnxruntime/core/flatbuffers/schema/ort.fbs (format version 6).
"""

from __future__ import annotations

import struct

import flatbuffers
from flatbuffers import number_types
from flatbuffers.table import Table

IDENTIFIER = b"ORTM"
ALIGNMENT = 16
"""Length of the file, and with it all that is aligned from its end, is a multiple of this."""
VERSION, MODEL, RESOLVER = 0, 1, 3
"""Fields of the root. In the tables below it, field 0 is the key and field 1 what belongs to it."""

Argument = tuple[int, int]
"""Input (0) or output (1), and its number."""
Types = list[tuple[bytes, list[Argument]]]
"""Type parameter -> arguments that have it."""


def canonical(data: bytes) -> bytes:
    """`data` with the part in front of the model written in a fixed order. Raises ValueError when it is another format.

    Offsets are counted from the end of the file, as the builder does, so what stays needs no change.
    """
    if data[4:8] != IDENTIFIER:
        raise ValueError("not a file in ONNX Runtime's format")
    root = Table(bytearray(data), struct.unpack_from("<I", data)[0])
    model = root.Indirect(_field(root, MODEL))
    cut = min(model, model - struct.unpack_from("<i", data, model)[0])  # the model's table and its field list
    version, entries = root.String(_field(root, VERSION)), _read_resolver(root)

    builder = flatbuffers.Builder(0)
    builder.Bytes, builder.head = bytearray(data[cut:]), 0
    builder.Prep(ALIGNMENT, 0)
    resolver = _table(builder, {0: _vector(builder, [_entry(builder, *entry) for entry in sorted(entries)])})
    name = builder.CreateString(version)
    fields = {VERSION: name, MODEL: len(data) - model, RESOLVER: resolver}
    builder.Finish(_table(builder, fields), IDENTIFIER)
    return bytes(builder.Output())


def _read_resolver(root: Table) -> list[tuple[bytes, Types]]:
    """Operator -> its type parameters."""
    resolver = Table(root.Bytes, root.Indirect(_field(root, RESOLVER)))
    return [(entry.String(_field(entry, 0)), _read_types(entry)) for entry in _tables(resolver, 0)]


def _read_types(entry: Table) -> Types:
    return [
        (types.String(_field(types, 0)), [(_number(a, 0, "Int8"), _number(a, 1, "Uint32")) for a in _tables(types, 1)])
        for types in _tables(entry, 1)
    ]


def _field(table: Table, index: int) -> int:
    """Where a field stands. Raises ValueError when it is not there."""
    place = table.Offset(4 + 2 * index)
    if not place:
        raise ValueError(f"field {index} is not there: another version of the format")
    return place + table.Pos


def _tables(table: Table, index: int) -> list[Table]:
    """The tables of a vector; a field that is not there is an empty one."""
    place = table.Offset(4 + 2 * index)
    if not place:
        return []
    start = table.Vector(place)
    return [Table(table.Bytes, table.Indirect(start + 4 * i)) for i in range(table.VectorLen(place))]


def _number(table: Table, index: int, kind: str) -> int:
    """A number; 0 when it is not there."""
    place = table.Offset(4 + 2 * index)
    return int(table.Get(getattr(number_types, f"{kind}Flags"), place + table.Pos)) if place else 0


def _entry(builder: flatbuffers.Builder, operator: bytes, types: Types) -> int:
    parts = [_type(builder, name, arguments) for name, arguments in sorted(types)]
    return _table(builder, {0: builder.CreateString(operator), 1: _vector(builder, parts)})


def _type(builder: flatbuffers.Builder, name: bytes, arguments: list[Argument]) -> int:
    parts = []
    for side, number in arguments:
        builder.StartObject(2)
        builder.PrependUint32Slot(1, number, 0)
        builder.PrependInt8Slot(0, side, 0)
        parts.append(builder.EndObject())
    return _table(builder, {0: builder.CreateString(name), 1: _vector(builder, parts)})


def _table(builder: flatbuffers.Builder, fields: dict[int, int]) -> int:
    """A table of references."""
    builder.StartObject(max(fields) + 1)
    for index, offset in fields.items():
        builder.PrependUOffsetTRelativeSlot(index, offset, 0)
    return builder.EndObject()


def _vector(builder: flatbuffers.Builder, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()
