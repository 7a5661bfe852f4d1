"""Cuts a decoder at attention and writes each piece as one XNNPACK delegate.

    first    norm, q k v, rotation                         of block 0
    middle   output projection, MLP, residuals of block i; norm, q k v, rotation of block i + 1
    last     output projection, MLP, residuals             of the last block; final norm, lm_head

Between two pieces stand only the KV cache and attention, which XNNPACK does not have (compose.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor

from afq_export.arch.attention import apply_rope
from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family, head
from afq_export.arch.ops import PlainSums, hadamard_matrix
from afq_export.errors import InputError
from afq_export.lower.executorch import weights
from afq_export.lower.executorch.graph import DType, Payload, Shape, Tokens, XnnGraph, per_tensor
from afq_export.lower.executorch.operand import Operand, activate
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear


@dataclasses.dataclass(frozen=True)
class Segment:
    """One delegate of `backend`: what it takes and returns (float32, `Tokens` where the size changes), its bytes."""

    name: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    payload: Payload
    backend: str = "XnnpackBackend"


class XnnOps(PlainSums):
    """`arch.ops.Ops` whose operations append nodes to a graph. `handles` numbers the linears of the whole program."""

    def __init__(
        self,
        config: DecoderConfig,
        linears: Mapping[str, QuantizedLinear],
        floats: Mapping[str, Tensor],
        handles: Mapping[str, int],
    ) -> None:
        self.config, self.linears, self.floats, self.handles = config, linears, floats, handles

    def linear(self, role: str, x: Operand) -> Operand:
        linear = self.linears[role]
        return Operand(x.graph, write_linear(x, linear, self.handles[linear.spec.name]))

    def norm(self, role: str, x: Operand) -> Operand:
        weight, bias = (self._constant(x.graph, f"{role}.{kind}") for kind in ("weight", "bias"))
        if self.config.family == "opt":
            x = x - x.mean_last()
        y = x * ((x * x).mean_last() + self.config.norm_eps).rsqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def rotate(self, x: Operand, rope: tuple[Operand, Operand]) -> Operand:
        return apply_rope(x, *rope)

    def activation(self, x: Operand) -> Operand:
        return activate(self.config.activation, x)

    def hadamard(self, x: Operand, size: int) -> Operand:
        return write_hadamard(x, size)

    def _constant(self, graph: XnnGraph, name: str) -> Operand | None:
        tensor = self.floats.get(name)
        return None if tensor is None else Operand(graph, graph.constant(tensor.float().numpy()))


def write_hadamard(x: Operand, size: int) -> Operand:
    """`x` [1, T, n] times Hadamard matrices: a float linear on all blocks of all tokens (fold/online.py)."""
    graph = x.graph
    rows = x.view((*x.shape[:-1], x.shape[-1] // size, size))
    matrix = graph.constant(hadamard_matrix(size).numpy())
    return Operand(graph, graph.fully_connected(rows.value, matrix, None)).view(x.shape)


def write_linear(x: Operand, linear: QuantizedLinear, handle: int) -> int:
    """Appends one quantized linear to the graph of `x`; returns its float32 value.

    Raises InputError for a kernel that this runtime does not have.
    """
    graph, record = x.graph, linear.record
    codes, scales = linear.codes.numpy(), linear.scales.float().numpy()
    shape = tuple(codes.shape)
    match record.kernel:
        case "qd8-f32-qc8w":
            weight = graph.per_channel(DType.xnn_datatype_qcint8, shape, codes, scales)
        case "qd8-f32-qc4w":
            weight = graph.per_channel(DType.xnn_datatype_qcint4, shape, weights.pack_int4(codes), scales)
        case "qd8-f32-qb4w":
            weight = graph.per_group(shape, weights.pack_int4(codes), weights.bfloat16_bits(scales))
        case "qs8-qc8w":
            return _write_static(x, linear, handle)
        case _:
            raise InputError("XNNPACK has no such kernel", where=record.spec.name, why=record.kernel)
    bias = None if linear.bias is None else graph.constant(linear.bias.float().numpy())
    return graph.fully_connected(graph.quantize_per_token(x.value), weight, bias, handle=handle)


def _write_static(x: Operand, linear: QuantizedLinear, handle: int) -> int:
    """Int8 in, int8 out, both grids stored; float32 on either side of it."""
    graph, record, scales = x.graph, linear.record, linear.scales.float().numpy()
    if record.input is None or record.output is None:
        raise InputError("a static linear needs the ranges of its input and output", where=record.spec.name)
    quantized = graph.quantize_static(x.value, record.input.scale, record.input.zero_point)
    weight = graph.per_channel(DType.xnn_datatype_qcint8, tuple(linear.codes.shape), linear.codes.numpy(), scales)
    bias = None
    if linear.bias is not None:
        steps = weights.static_bias(linear.bias.numpy(), record.input.scale, scales)
        grid = weights.static_bias_scales(record.input.scale, scales)
        bias = graph.per_channel(DType.xnn_datatype_qcint32, steps.shape, steps, grid)
    grid = per_tensor(record.output.scale, record.output.zero_point)
    return graph.dequantize(graph.fully_connected(quantized, weight, bias, handle=handle, grid=grid))


def segments(checkpoint: QuantizedCheckpoint, prefill: int) -> Iterator[Segment]:
    """The pieces of the decoder in order, one more than there are blocks, for calls of up to `prefill` tokens.

    Reads one block at a time.
    """
    config, arch = checkpoint.config, family(checkpoint.config)
    handles = linear_handles(checkpoint)
    tokens = Tokens(prefill)
    hidden, attended = (1, tokens, config.hidden), (1, tokens, config.heads, config.head_dim)
    rotation = ((tokens, config.head_dim),) * 2 if config.rope else ()

    before: XnnOps | None = None
    for index in range(config.layers + 1):
        last = index == config.layers
        if last:
            after = XnnOps(config, {"lm_head": checkpoint.linear("lm_head")}, checkpoint.head_floats(), handles)
        else:
            after = XnnOps(config, checkpoint.block(index), checkpoint.block_floats(index), handles)
        inputs = (hidden, *((attended,) if before else ()), *(() if last else rotation))
        graph = XnnGraph()
        x, *rest = (Operand(graph, graph.input(shape)) for shape in inputs)
        outputs: list[Operand] = []
        if before:
            attention, *rest = rest
            x = arch.attention_out(config, before, x, attention)
            outputs = [] if last else [x]
        outputs += [head(after, x)] if last else arch.attention_in(config, after, x, tuple(rest) or None)
        for operand in outputs:
            graph.output(operand.value)
        yield Segment(f"segment_{index}", inputs, tuple(operand.shape for operand in outputs), graph.finish())
        before = after


def linear_handles(checkpoint: QuantizedCheckpoint) -> dict[str, int]:
    """The number by which a linear is known in the program: its place in running order, from 1."""
    return {name: number for number, name in enumerate(checkpoint.records, start=1)}


def probe_segment(linears: Mapping[str, QuantizedLinear], shapes: Mapping[str, Shape]) -> Segment:
    """One delegate with every linear on its own input (float32 of shape `shapes[name]`), results in the same order."""
    graph = XnnGraph()
    inputs = {name: Operand(graph, graph.input(shapes[name])) for name in linears}
    for number, (name, linear) in enumerate(linears.items(), start=1):
        graph.output(write_linear(inputs[name], linear, number))
    outputs = tuple((*shapes[name][:-1], linear.spec.outputs) for name, linear in linears.items())
    return Segment("probe", tuple(shapes[name] for name in linears), outputs, graph.finish())
