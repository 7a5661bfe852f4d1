"""model.pte: the host's part in portable operators, around one delegate that is Vela's command stream.

    forward(ids int64 [1, T], position int64 [1], past.0.key, past.0.value, ...)
        -> logits i16 [1, T, V], new.0.key, new.0.value, ...
    decode   the same for T = 1, where the target asks for it

Codes and steps are those of decoder.py. The caller keeps the caches, and writes what is new behind `position` tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import struct
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.schema import KernelCall
from torch import Tensor, nn
from torch.export import ExportedProgram

from afq_export.errors import InputError
from afq_export.lower.tosa.graph import TosaGraph
from afq_export.lower.tosa.host import HostTables
from afq_export.lower.traces import forget_traces
from afq_export.runtime.executorch import HEADER_SIZE, check_program_header

BACKEND = "EthosUBackend"
HOST_INPUTS = ("rows", "row_steps", "cos", "sin", "mask")
"""Inputs of the graph that the host makes from token ids and a position, in the order of `HostPart`."""
TORCH = {"i8": torch.int8, "i16": torch.int16, "i32": torch.int32}


class HostPart(nn.Module):
    """Token ids [1, T] and how many tokens precede them, to the first inputs of the graph."""

    def __init__(self, tables: HostTables, tokens: int) -> None:
        super().__init__()
        for name in ("rows", "row_steps", "cos", "sin"):
            self.register_buffer(name, torch.from_numpy(getattr(tables, name)))
        self.register_buffer("offsets", torch.arange(tokens))
        self.register_buffer("slots", torch.arange(tables.shape.past))
        hidden = torch.full((1, tokens, tokens), -1, dtype=torch.int8)
        self.register_buffer("later", hidden.triu(1))
        self.tokens, self.past = tokens, tables.shape.past

    def forward(self, ids: Tensor, position: Tensor) -> list[Tensor]:
        where = torch.clamp(position + self.offsets, max=self.past - 1)
        tokens = self.tokens
        past = -(self.slots >= position).to(torch.int8)
        mask = torch.cat((past.view(1, 1, -1).expand(1, tokens, -1), self.later), dim=-1)
        turns = [F.embedding(where, table).view(1, tokens, 1, -1) for table in (self.cos, self.sin)]
        return [F.embedding(ids, self.rows), F.embedding(ids, self.row_steps), *turns, mask]


class _Outline(nn.Module):
    """Stands for the delegate while the program is traced: results of the right shapes and types."""

    def __init__(self, graph: TosaGraph) -> None:
        super().__init__()
        self.results = [(graph.values[name].shape, TORCH[graph.values[name].type]) for name in graph.outputs]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype) for shape, dtype in self.results]


class _Program(nn.Module):
    def __init__(self, host: HostPart, delegate: nn.Module, order: list[int]) -> None:
        super().__init__()
        self.host, self.delegate, self.order = host, delegate, order

    def forward(self, ids: Tensor, position: Tensor, *past: Tensor) -> list[Tensor]:
        given = [*self.host(ids, position), *past]
        return list(self.delegate(*(given[index] for index in self.order)))


def write_program(methods: Mapping[str, tuple[TosaGraph, bytes]], tables: HostTables) -> bytes:
    """The .pte with these methods: each a graph and the command stream that Vela has made of it."""
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    constants = {
        "get_vocab_size": len(tables.rows),
        "get_max_context_len": tables.shape.past,
        "get_max_seq_len": tables.shape.tokens,
        "get_logit_step": tables.logit_step,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own internals
        exported = {name: _export(graph, tables, stream, config) for name, (graph, stream) in methods.items()}
        buffer = to_edge(exported, constant_methods=constants, compile_config=config).to_executorch().buffer
    for program in exported.values():
        forget_traces(program.graph_module)
    return bytes(buffer)


def _export(graph: TosaGraph, tables: HostTables, stream: bytes, config: EdgeCompileConfig) -> ExportedProgram:
    """One method around its delegate."""
    example = {
        name: torch.zeros(graph.values[name].shape, dtype=TORCH[graph.values[name].type]) for name in graph.inputs
    }
    tokens = graph.values["rows"].shape[1]
    past = [name for name in graph.inputs if name not in HOST_INPUTS]
    order = [[*HOST_INPUTS, *past].index(name) for name in graph.inputs]
    inputs = (torch.zeros(1, tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    outline = to_edge(torch.export.export(_Outline(graph), tuple(example.values())), compile_config=config)
    lowered = LoweredBackendModule(outline.exported_program(), BACKEND, stream, [], None)
    program = _Program(HostPart(tables, tokens), lowered, order).eval()
    return torch.export.export(program, (*inputs, *(example[name] for name in past)))


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of a program: its delegates (backend, bytes), and how often it calls each operator outside of them."""

    delegates: tuple[tuple[str, bytes], ...]
    calls: dict[str, int]


def read_methods(pte: bytes) -> dict[str, Method]:
    """The methods of a program that have a delegate, by name. Raises InputError when `pte` is no program."""
    check_program_header(pte[:HEADER_SIZE], len(pte), "program in memory")
    try:
        program = deserialize_pte_binary(pte).program
    except (struct.error, ValueError, IndexError, KeyError, TypeError, AssertionError) as error:
        raise InputError("not a program of this package", why=str(error)) from error
    methods = {}
    for plan in program.execution_plan:
        names = [".".join(filter(None, (operator.name, operator.overload))) for operator in plan.operators]
        arguments = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
        calls = collections.Counter(names[call.op_index] for call in arguments if isinstance(call, KernelCall))
        data = program.backend_delegate_data
        delegates = tuple((delegate.id, bytes(data[delegate.processed.index].data)) for delegate in plan.delegates)
        if delegates:
            methods[plan.name] = Method(delegates, dict(calls))
    return methods
