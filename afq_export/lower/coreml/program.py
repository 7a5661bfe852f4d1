"""From a quantized checkpoint to a Core ML package and an ExecuTorch program that holds it, both read back."""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path

import coremltools as ct
import numpy as np
import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from torch import Tensor, nn

from afq_export.arch.attention import rope_tables
from afq_export.errors import InputError, VerdictError
from afq_export.lower.coreml.decoder import build_program, value_name
from afq_export.lower.coreml.package import delegate_bytes, unpack_delegate, write_package
from afq_export.lower.coreml.readback import Content, read_package
from afq_export.lower.executorch.compose import call_segment, export_program
from afq_export.lower.executorch.graph import Payload, Tokens
from afq_export.lower.executorch.metadata import metadata
from afq_export.lower.executorch.readback import read_outline
from afq_export.lower.executorch.segments import Segment
from afq_export.lower.stored import StoredLinear, difference
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.spec.report import Coverage, Lowered, Refused
from afq_export.spec.target import TargetProfile

BACKEND = "CoreMLBackend"
"""What ExecuTorch calls the delegate."""
MIN_PREFILL = 2
"""With fewer tokens a call the exporter would take their number for a constant."""
INT4_BITS = 4
REASONS = {
    "scaled_dot_product_attention": "float16: attention over the cache",
    "rsqrt": "float32: a norm; its squares leave float16's range at 256",
    "layer_norm": "float32: a norm; its squares leave float16's range at 256",
    "silu": "float16: the MLP's nonlinearity",
    "relu": "float16: the MLP's nonlinearity",
    "gelu": "float16: the MLP's nonlinearity",
    "slice_update": "float16: writes keys and values into the cache, state of the program",
    "gather": "looks up token rows, or the rotation of the positions",
}
"""Operation that is no integer linear -> why. The rest is sums, shapes and positions."""


def lower_coreml(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    package: Path,
    facts: dict[str, str],
    progress: Progress,
) -> bytes:
    """Writes the .mlpackage to the folder `package` and returns the .pte that holds the same, both verified.

    Raises InputError for shapes that do not fit, VerdictError when a linear of the files is not the checkpoint's.
    """
    if target.coreml is None:
        raise InputError("the target has no [coreml] table", where=target.name, do='start from base = "ios-coreml"')
    config = checkpoint.config
    context = min(target.shapes.context, config.max_positions)
    prefill = min(target.shapes.prefill, context)
    if prefill < MIN_PREFILL:
        raise InputError("the program needs room for two tokens a call", where=target.name, why=f"prefill {prefill}")
    tokens, opset = ct.RangeDim(1, prefill, default=1), ct.target[target.coreml.deployment_target]
    write_package(build_program(checkpoint, context, tokens, opset, progress), tokens, opset, facts, package)
    verify_package(checkpoint, read_package(package))
    progress("lower", config.layers + 1, config.layers + 2)
    values = metadata(config, context, prefill) | {"use_sdpa_with_kv_cache": False}
    shapes = ((1, Tokens(prefill)), (1,)), ((1, Tokens(prefill), config.vocab),)
    payload = Payload(delegate_bytes(package), NamedDataStore().get_named_data_store_output())
    segment = Segment("decoder", *shapes, payload, BACKEND)
    example = (torch.zeros((1, MIN_PREFILL), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    dynamic = {"tokens": {1: torch.export.Dim("tokens", min=1, max=prefill)}, "input_pos": None}
    pte = export_program(_Carrier(segment), example, [segment], dynamic_shapes=dynamic, metadata=values).buffer
    verify_package(checkpoint, read_delegate(pte))
    progress("lower", config.layers + 2, config.layers + 2)
    return pte


def read_delegate(pte: bytes) -> Content:
    """The package inside a program. Raises InputError when it holds none."""
    outline = read_outline(pte)
    found = [delegate.data for delegate in outline.delegates if delegate.backend == BACKEND]
    if len(found) != 1 or outline.delegate_calls != 1:
        raise InputError("not a Core ML program of this package", why=f"{len(found)} Core ML delegates")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return read_package(unpack_delegate(found[0], Path(folder)))
        except ValueError as error:
            raise InputError("not a Core ML program of this package", why=str(error)) from error


def verify_package(checkpoint: QuantizedCheckpoint, content: Content) -> None:
    """Raises VerdictError naming the first linear, or the token rows, that a package lacks or holds otherwise."""
    found = dict(content.linears())
    for name in checkpoint.records:
        wrong = "it is not there"
        if value_name(name) in found:
            wrong = difference(_expected(checkpoint.linear(name)), found[value_name(name)])
        if wrong:
            raise VerdictError("the program is not the checkpoint", where=name, why=wrong)
    if len(found) != len(checkpoint.records):
        raise VerdictError("the program has linears of its own", why=f"{len(found)} for {len(checkpoint.records)}")
    _verify_floats(checkpoint, content)


def coverage_of(checkpoint: QuantizedCheckpoint, content: Content, calls: dict[str, int]) -> Coverage:
    """Every linear with its kernel, what computes in float inside the program, and what ExecuTorch runs outside."""
    lowered = tuple(Lowered(name, record.kernel) for name, record in checkpoint.records.items())
    kinds = collections.Counter(operation.kind for operation in content.operations)
    inside = [Refused(kind, kinds[kind], REASONS[kind]) for kind in REASONS if kinds[kind]]
    outside = [Refused(name, count, "not delegated: ExecuTorch's own kernel") for name, count in calls.items()]
    return Coverage(lowered, tuple(inside + outside))


def _expected(linear: QuantizedLinear) -> StoredLinear:
    """What the package must hold of a linear: float16 scales and bias, 0 where there is none."""
    bits = 4 if linear.spec.weight.bits <= INT4_BITS else 8
    bias = np.zeros(linear.spec.outputs, np.float16) if linear.bias is None else _half(linear.bias)
    return StoredLinear(f"int{bits}", linear.codes.numpy(), linear.scales.float().numpy(), bias)


def _verify_floats(checkpoint: QuantizedCheckpoint, content: Content) -> None:
    """Norms, learned positions, the rotations' tables and token rows."""
    stored = {(value.shape, value.tobytes()) for value in content.constants.values()}
    wanted: dict[str, np.ndarray] = {}
    for index in range(checkpoint.config.layers):
        floats = checkpoint.block_floats(index)
        wanted |= {f"blocks.{index}.{name}": tensor.float().numpy() for name, tensor in floats.items()}
    wanted |= {name: tensor.float().numpy() for name, tensor in checkpoint.head_floats().items()}
    wanted |= {name: _half(tensor) for name, tensor in checkpoint.embedding_floats().items()}
    if checkpoint.config.rope:
        context = next(iter(content.states.values()))[2]
        tables = rope_tables(checkpoint.config.rope, torch.arange(context))
        wanted |= {f"rotation {name}": _half(table) for name, table in zip(("cos", "sin"), tables, strict=True)}
    embedding = checkpoint.embedding()
    if embedding.scales is None:
        wanted["embed_tokens"] = embedding.codes.float().numpy()
    else:
        codes, scales = content.quantized().get("embed_tokens", (None, None))
        if not (np.array_equal(codes, embedding.codes) and np.array_equal(scales, embedding.scales.float())):
            raise VerdictError("the program is not the checkpoint", where="embed_tokens", why="rows differ")
    for name, array in wanted.items():
        if (array.shape, array.tobytes()) not in stored:
            raise VerdictError("the program is not the checkpoint", where=name, why="its numbers are not there")


def _half(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy().astype(np.float16)


class _Carrier(nn.Module):
    """A program whose only call is the delegate."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        return call_segment(self.segment, [tokens, input_pos])[0]
