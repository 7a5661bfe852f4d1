"""Reads a finished program back: which integers are really in it, and what it calls."""

from __future__ import annotations

import collections
import dataclasses
import struct

import numpy as np
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNDatatype
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary
from executorch.exir.schema import DelegateCall, KernelCall

from afq_export.errors import InputError
from afq_export.lower.executorch import weights
from afq_export.lower.executorch.payload import FullyConnected, Value, fully_connected
from afq_export.quantize.checkpoint import StaticRange
from afq_export.runtime.executorch import HEADER_SIZE, check_program_header

KINDS = {
    ("qdint8", "qcint8"): "qc8w",
    ("qdint8", "qcint4"): "qc4w",
    ("qdint8", "qbint4"): "qb4w",
    ("qint8", "qcint8"): "qs8",
}
"""(input type, weight type) -> what this package calls the kernel."""

ALIGNMENT = 16
"""Of constants outside of delegates."""


@dataclasses.dataclass(frozen=True)
class PackedLinear:
    """One quantized linear as it stands in a program. `number` is its place in running order, from 1.

    `scales` float32 [O, G]; `bias` float32 [O], or int32 [O] steps for "qs8", or None; `input` and `output` are the
    stored int8 grids of "qs8". Codes stay packed until asked for.
    """

    number: int
    kind: str
    shape: tuple[int, int]
    scales: np.ndarray
    bias: np.ndarray | None
    input: StaticRange | None
    output: StaticRange | None
    packed: bytes = dataclasses.field(repr=False)

    @property
    def codes(self) -> np.ndarray:
        """int8 [O, I]."""
        if self.kind in ("qc4w", "qb4w"):
            return weights.unpack_int4(self.packed, *self.shape)
        return np.frombuffer(self.packed, np.int8).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class ProgramContent:
    """The linears of a program in running order, its delegates, how often it calls each operator outside them, and the
    bytes of all constants: those of delegates, and those outside (padded with zeros, by less than ALIGNMENT)."""

    linears: list[PackedLinear]
    delegates: int
    calls: dict[str, int]
    inside: frozenset[bytes] = dataclasses.field(repr=False)
    outside: tuple[bytes, ...] = dataclasses.field(repr=False)

    def holds_outside(self, data: bytes) -> bool:
        """Whether `data` is a constant outside of delegates."""
        same_size = (c for c in self.outside if len(data) <= len(c) < len(data) + ALIGNMENT)
        return any(c.startswith(data) and not any(c[len(data) :]) for c in same_size)


@dataclasses.dataclass(frozen=True)
class Delegate:
    """One delegate of a program: the backend that runs it, and its bytes in that backend's own format."""

    backend: str
    data: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Outline:
    """A program whatever its delegates: these, how often it calls them and each operator outside them, the constants
    that delegates name, and those outside (padded)."""

    delegates: tuple[Delegate, ...]
    delegate_calls: int
    calls: dict[str, int]
    constants: dict[str, bytes] = dataclasses.field(repr=False)
    outside: tuple[bytes, ...] = dataclasses.field(repr=False)


def read_linears(pte: bytes) -> list[PackedLinear]:
    """The quantized linears of a program, in running order. Raises InputError when `pte` is no such program."""
    return read_program(pte).linears


def read_program(pte: bytes) -> ProgramContent:
    """Everything `lower_program` checks about a finished program. Raises InputError when `pte` is not one."""
    outline = read_outline(pte)
    try:
        linears = [
            _linear(node, outline.constants)
            for delegate in outline.delegates
            for node in fully_connected(delegate.data)
            if node.weight.scales
        ]
    except (struct.error, ValueError, IndexError, KeyError, TypeError, AssertionError) as error:
        raise InputError("not a program of this package", why=str(error)) from error
    linears.sort(key=lambda linear: linear.number)
    inside = frozenset(outline.constants.values())
    return ProgramContent(linears, outline.delegate_calls, outline.calls, inside, outline.outside)


def read_outline(pte: bytes) -> Outline:
    """A program's delegates as they are, and what it calls. Raises InputError when `pte` is no program."""
    check_program_header(pte[:HEADER_SIZE], len(pte), "program in memory")
    try:
        file = deserialize_pte_binary(pte)
        plan = file.program.execution_plan[0]
        delegates = tuple(
            Delegate(delegate.id, file.program.backend_delegate_data[delegate.processed.index].data)
            for delegate in plan.delegates
        )
        instructions = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
        names = [".".join(filter(None, (operator.name, operator.overload))) for operator in plan.operators]
        calls = collections.Counter(names[call.op_index] for call in instructions if isinstance(call, KernelCall))
    except (struct.error, ValueError, IndexError, KeyError, TypeError, AssertionError) as error:
        raise InputError("not a program of this package", why=str(error)) from error
    delegate_calls = sum(isinstance(call, DelegateCall) for call in instructions)
    outside = tuple(buffer.storage for buffer in file.program.constant_buffer)
    return Outline(delegates, delegate_calls, dict(calls), _constants(file), outside)


def _constants(file: PTEFile) -> dict[str, bytes]:
    stored = file.named_data
    return {} if stored is None else {key: stored.buffers[entry.buffer_index] for key, entry in stored.pte_data.items()}


def _linear(node: FullyConnected, constants: dict[str, bytes]) -> PackedLinear:
    weight, (outputs, inputs) = node.weight, node.weight.shape
    kind = KINDS[_short(node.input.dtype), _short(weight.dtype)]
    if weight.group:
        scales = weights.from_bfloat16_bits(constants[weight.scales], outputs, inputs // weight.group)
    else:
        scales = np.frombuffer(constants[weight.scales], np.float32).reshape(outputs, 1)
    static = kind == "qs8"
    bias = None
    if node.bias is not None:
        bias = np.frombuffer(constants[node.bias.data], np.int32 if static else np.float32)
    return PackedLinear(
        number=node.handle,
        kind=kind,
        shape=(outputs, inputs),
        scales=scales,
        bias=bias,
        input=_grid(node.input) if static else None,
        output=_grid(node.output) if static else None,
        packed=constants[weight.data],
    )


def _grid(value: Value) -> StaticRange:
    return StaticRange(scale=value.scale, zero_point=value.zero_point)


def _short(dtype: XNNDatatype) -> str:
    return dtype.name.removeprefix("xnn_datatype_")
