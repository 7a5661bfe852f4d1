"""From a quantized checkpoint to a generation-ready ExecuTorch program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from afq_export.arch.ops import hadamard_matrix
from afq_export.errors import InputError, VerdictError
from afq_export.lower.executorch.compose import export_program
from afq_export.lower.executorch.coverage import coverage_of
from afq_export.lower.executorch.decoder import CachedDecoder, TokenRows
from afq_export.lower.executorch.metadata import metadata
from afq_export.lower.executorch.readback import PackedLinear, ProgramContent, read_program
from afq_export.lower.executorch.segments import Segment, linear_handles, segments
from afq_export.lower.executorch.weights import static_bias
from afq_export.lower.stored import StoredLinear, difference
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.spec.report import Coverage
from afq_export.spec.target import TargetProfile

KIND_OF_KERNEL = {
    "qd8-f32-qc8w": "qc8w",
    "qd8-f32-qc4w": "qc4w",
    "qd8-f32-qb4w": "qb4w",
    "qs8-qc8w": "qs8",
}
"""The target's kernel name -> what reading a program back calls it."""

MIN_PREFILL = 2
"""With fewer tokens a call the exporter would take their number for a constant."""


@dataclasses.dataclass(frozen=True)
class LoweredProgram:
    """`pte`: the file. `coverage`: what runs where. `metadata`: the program's constant methods."""

    pte: bytes
    coverage: Coverage
    metadata: dict[str, int | bool | list[int]]


def lower_program(checkpoint: QuantizedCheckpoint, target: TargetProfile, progress: Progress) -> LoweredProgram:
    """The program of `checkpoint`, verified by reading it back.

    The context is the smaller of the target's and the model's. Reads the checkpoint one block at a time.
    Raises InputError for shapes or kernels that the runtime does not have, VerdictError when a linear of the finished
    file is not the checkpoint's to the bit.
    """
    context = min(target.shapes.context, checkpoint.config.max_positions)
    prefill = min(target.shapes.prefill, context)
    if prefill < MIN_PREFILL:
        raise InputError("the program needs room for two tokens a call", where=target.name, why=f"prefill {prefill}")
    values = metadata(checkpoint.config, context, prefill)

    pieces: list[Segment] = []
    steps = checkpoint.config.layers + 2
    for piece in segments(checkpoint, prefill):
        pieces.append(piece)
        progress("lower", len(pieces), steps)
    pte = _export(CachedDecoder(checkpoint, pieces, context), pieces, prefill, values)
    del pieces
    content = read_program(pte)
    verify_program(checkpoint, content)
    progress("lower", steps, steps)
    return LoweredProgram(pte, coverage_of(checkpoint, content), values)


def _export(module: CachedDecoder, pieces: list[Segment], prefill: int, values: dict) -> bytes:
    example = (torch.zeros((1, MIN_PREFILL), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    count = torch.export.Dim("tokens", min=1, max=prefill)
    shapes = {"tokens": {1: count}, "input_pos": None}
    return export_program(module, example, pieces, dynamic_shapes=shapes, metadata=values).buffer


def verify_program(checkpoint: QuantizedCheckpoint, content: ProgramContent) -> None:
    """Raises VerdictError naming the first linear, or else float constant, that the program lacks or holds with other
    numbers."""
    verify_linears(checkpoint, content.linears)
    missing = [name for name, data in _norms(checkpoint) if data not in content.inside]
    missing += [name for name, data in _tables(checkpoint) if not content.holds_outside(data)]
    if missing:
        raise VerdictError("the program is not the checkpoint", where=missing[0], why="its numbers are not there")


def verify_linears(checkpoint: QuantizedCheckpoint, packed: list[PackedLinear]) -> None:
    """Raises VerdictError naming the first linear that the program lacks or holds with other numbers."""
    found = {linear.number: linear for linear in packed}
    for name, number in linear_handles(checkpoint).items():
        wrong = "it is not there"
        if number in found:
            wrong = difference(_expected(checkpoint.linear(name)), found[number])
        if wrong:
            raise VerdictError("the program is not the checkpoint", where=name, why=wrong)
    if len(packed) != len(found) or len(found) != len(checkpoint.records):
        raise VerdictError("the program has linears of its own", why=f"{len(packed)} for {len(checkpoint.records)}")


def _norms(checkpoint: QuantizedCheckpoint) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every norm's weight and bias: the float constants of delegates."""
    for index in range(checkpoint.config.layers):
        for name, tensor in checkpoint.block_floats(index).items():
            yield f"blocks.{index}.{name}", tensor.float().numpy().tobytes()
    for name, tensor in checkpoint.head_floats().items():
        yield name, tensor.float().numpy().tobytes()
    if checkpoint.config.down_hadamard:
        yield "hadamard", hadamard_matrix(checkpoint.config.down_hadamard).numpy().tobytes()


def _tables(checkpoint: QuantizedCheckpoint) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of token rows and learned positions: what is looked up outside of delegates."""
    for name, tensor in TokenRows(checkpoint.embedding()).named_buffers():
        yield f"embed_tokens.{name}", tensor.numpy().tobytes()
    for name, tensor in checkpoint.embedding_floats().items():
        yield name, tensor.float().numpy().tobytes()


def _expected(linear: QuantizedLinear) -> StoredLinear:
    """What the program must hold of a linear."""
    return StoredLinear(
        kind=KIND_OF_KERNEL[linear.record.kernel],
        codes=linear.codes.numpy(),
        scales=linear.scales.float().numpy(),
        bias=_stored_bias(linear),
        input=linear.record.input,
        output=linear.record.output,
    )


def _stored_bias(linear: QuantizedLinear) -> np.ndarray | None:
    """The bias as the kernel takes it: float32, or int32 steps when the input's grid is stored."""
    if linear.bias is None:
        return None
    bias, grid = linear.bias.float().numpy(), linear.record.input
    return bias if grid is None else static_bias(bias, grid.scale, linear.scales.float().numpy())
