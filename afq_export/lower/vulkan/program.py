"""From a quantized checkpoint to an ExecuTorch program whose decoder is one Vulkan delegate, read back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from afq_export.errors import InputError, VerdictError
from afq_export.lower.executorch.coverage import BOOKKEEPING
from afq_export.lower.executorch.coverage import REASONS as OUTSIDE
from afq_export.lower.executorch.metadata import metadata
from afq_export.lower.executorch.weights import pack_embedding_int4
from afq_export.lower.stored import StoredLinear, difference
from afq_export.lower.traces import forget_traces
from afq_export.lower.vulkan.decoder import TracedDecoder
from afq_export.lower.vulkan.readback import DYNAMIC, FLOAT_LINEARS, WEIGHT_ONLY, VulkanContent, read_vulkan
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.runtime.library import quiet
from afq_export.spec.report import Coverage, Lowered, Refused
from afq_export.spec.target import TargetProfile

MIN_PREFILL = 2
"""With fewer tokens a call the exporter would take their number for a constant."""
STEPS = 4
INSIDE = {
    "sdpa_with_kv_cache.default": "float: attention over the cache, which it keeps",
    "et_vk.rms_norm.default": "float: a norm",
    "aten.native_layer_norm.default": "float: a norm",
    "aten.sigmoid.default": "float: the MLP's nonlinearity",
    "aten.relu.default": "float: the MLP's nonlinearity",
    "aten.gelu.default": "float: the MLP's nonlinearity",
    "aten.embedding.default": "looks up float rows",
    "et_vk.embedding_q4gsw.default": "looks up int4 rows and scales them",
}
"""Operator of the delegate that is no integer linear -> why. The rest is sums, rotation, shapes and positions."""


def lower_vulkan(checkpoint: QuantizedCheckpoint, target: TargetProfile, progress: Progress) -> bytes:
    """The .pte, verified by reading it back. The context is the smaller of the target's and the model's.

    Raises InputError for shapes that do not fit, VerdictError when a linear of the file is not the checkpoint's.
    """
    config = checkpoint.config
    context = min(target.shapes.context, config.max_positions)
    prefill = min(target.shapes.prefill, context)
    if prefill < MIN_PREFILL:
        raise InputError("the program needs room for two tokens a call", where=target.name, why=f"prefill {prefill}")
    module = TracedDecoder(checkpoint, context)
    progress("lower", 1, STEPS)
    example = (torch.zeros((1, MIN_PREFILL), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    shapes = {"tokens": {1: torch.export.Dim("tokens", min=1, max=prefill)}, "input_pos": None}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own internals
        exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    progress("lower", 2, STEPS)
    pte = _lower(exported, metadata(config, context, prefill))
    progress("lower", 3, STEPS)
    verify_vulkan(checkpoint, read_vulkan(pte))
    progress("lower", STEPS, STEPS)
    return pte


def verify_vulkan(checkpoint: QuantizedCheckpoint, content: VulkanContent) -> None:
    """Raises VerdictError naming the first linear that the program lacks, computes in float or holds otherwise."""
    dropped = [name for name in FLOAT_LINEARS if name in content.operators or name in content.outline.calls]
    if dropped:
        why = f"{dropped[0]}: the backend did not recognise a quantized linear and computes it in float"
        raise VerdictError("the program is not the checkpoint", why=why)
    found = content.linears
    if len(found) != len(checkpoint.records):
        raise VerdictError(
            "the program is not the checkpoint", why=f"{len(found)} of {len(checkpoint.records)} linears"
        )
    for (name, _), stored in zip(checkpoint.records.items(), found, strict=True):
        wrong = difference(_expected(checkpoint.linear(name)), stored)
        if wrong:
            raise VerdictError("the program is not the checkpoint", where=name, why=wrong)
    inside = {array.tobytes() for array in content.constants()}
    for name, arrays in _floats(checkpoint):
        held = any(array.tobytes() in inside or _outside(content, array.tobytes()) for array in arrays)
        if not held:
            raise VerdictError("the program is not the checkpoint", where=name, why="its numbers are not there")


def coverage_of(checkpoint: QuantizedCheckpoint, content: VulkanContent) -> Coverage:
    """Every linear with its kernel, what computes in float inside the delegate, and what is not delegated."""
    lowered = tuple(Lowered(name, record.kernel) for name, record in checkpoint.records.items())
    counts = content.operators
    inside = [Refused(name, counts[name], reason) for name, reason in INSIDE.items() if name in counts]
    outside: dict[str, int] = {}
    for operator, count in content.outline.calls.items():
        name = operator.rsplit(".", 1)[0]
        what = name if name in OUTSIDE else "positions and shapes"
        outside[what] = outside.get(what, 0) + count
    left = [
        Refused(what, count, f"not delegated: {OUTSIDE.get(what, BOOKKEEPING).replace('XNNPACK', 'Vulkan')}")
        for what, count in sorted(outside.items())
    ]
    return Coverage(lowered, tuple(inside + left))


def _lower(exported: torch.export.ExportedProgram, values: dict) -> bytes:
    with quiet():
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.backend.utils import is_same_node

    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=False)
    loggers = logging.getLogger()
    level = loggers.level
    loggers.setLevel(logging.WARNING)  # the partitioner writes every operator to the root logger
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            edge = to_edge_transform_and_lower(
                exported,
                partitioner=[VulkanPartitioner({"require_dynamic_shapes": True})],
                compile_config=config,
                constant_methods=values,
            )
            buffer = edge.to_executorch().buffer
    finally:
        loggers.setLevel(level)
    forget_traces(edge.exported_program().graph_module)
    is_same_node.cache_clear()  # the partitioner's, of all nodes it compared: they hold their graphs and all weights
    return buffer


def _expected(linear: QuantizedLinear) -> StoredLinear:
    """What the program must hold of a linear."""
    return StoredLinear(
        kind=WEIGHT_ONLY if linear.spec.activation is None else DYNAMIC,
        codes=linear.codes.numpy(),
        scales=linear.scales.float().numpy(),
        bias=None if linear.bias is None else linear.bias.float().numpy(),
    )


def _outside(content: VulkanContent, data: bytes) -> bool:
    """Whether `data` is a constant outside of delegates (padded with zeros there)."""
    return any(stored.startswith(data) and not any(stored[len(data) :]) for stored in content.outline.outside)


def _floats(checkpoint: QuantizedCheckpoint) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    """Norms, positions and token rows, each in every form in which the program may have them."""
    for index in range(checkpoint.config.layers):
        for name, tensor in checkpoint.block_floats(index).items():
            yield f"blocks.{index}.{name}", (tensor.float().numpy(),)
    for name, tensor in (checkpoint.head_floats() | checkpoint.embedding_floats()).items():
        yield name, (tensor.float().numpy(),)
    embedding = checkpoint.embedding()
    codes = embedding.codes.numpy()
    if embedding.bits == 4:
        packed = pack_embedding_int4(codes)  # outside as it is; inside the delegate nibbles change places
        yield "embed_tokens", (packed, (packed >> 4) | (packed << 4))
    else:
        yield "embed_tokens", (codes if embedding.bits == 8 else codes.astype(np.float32),)
    if embedding.scales is not None:
        scales = embedding.scales.float().numpy()
        yield "embed_tokens scales", (scales, np.ascontiguousarray(scales.T))
