"""model.pte for Cortex-M: the decoder exported for calls of a fixed length, with its memory planned."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from executorch.exir import EdgeCompileConfig, to_edge
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import Tensor

from afq_export.errors import VerdictError
from afq_export.lower.cortex_m.module import CortexMDecoder
from afq_export.lower.cortex_m.readback import read_linears
from afq_export.lower.stored import StoredLinear, difference
from afq_export.lower.traces import forget_traces
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.validate.integer.cmsis_nn import bias_steps, requantization


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tokens of a call, and of the cache that precedes it."""

    tokens: int
    context: int


def export_program(checkpoint: QuantizedCheckpoint, shape: Shape, progress: Progress) -> bytes:
    """The .pte, whose linears are the checkpoint's. Raises VerdictError when they are not."""
    config, steps = checkpoint.config, 3
    module = CortexMDecoder(checkpoint, shape.tokens, shape.context).eval()
    progress("lower", 0, steps)
    constants = {
        "get_vocab_size": config.vocab,
        "get_max_context_len": shape.context,
        "get_max_seq_len": shape.tokens,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own internals
        exported = torch.export.export(module, example_inputs(checkpoint, shape), strict=False)
        progress("lower", 1, steps)
        config_ = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        edge = to_edge(exported, constant_methods=constants, compile_config=config_)
        pte = edge.to_executorch().buffer
    forget_traces(exported.graph_module)
    progress("lower", 2, steps)
    verify(checkpoint, pte)
    progress("lower", steps, steps)
    return pte


def example_inputs(checkpoint: QuantizedCheckpoint, shape: Shape) -> tuple[Tensor, ...]:
    """Ids, position and empty caches of the right sizes."""
    config = checkpoint.config
    cache = torch.zeros(1, shape.context, config.kv_heads, config.head_dim)
    ids, position = torch.zeros(1, shape.tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return (ids, position, *(cache.clone() for _ in range(2 * config.layers)))


def planned_memory(pte: bytes) -> int:
    """Bytes of SRAM that a call takes, inputs and outputs included, as ExecuTorch planned them."""
    return sum(deserialize_pte_binary(pte).program.execution_plan[0].non_const_buffer_sizes)


def verify(checkpoint: QuantizedCheckpoint, pte: bytes) -> list[StoredLinear]:
    """The linears of a program in running order. Raises VerdictError naming the first that is not the checkpoint's."""
    found, names = read_linears(pte), list(checkpoint.records)
    if len(found) != len(names):
        raise VerdictError("the file is not the checkpoint", why=f"{len(found)} linears, not {len(names)}")
    for name, stored in zip(names, found, strict=True):
        wrong = difference(expected_linear(checkpoint.linear(name)), stored)
        if wrong:
            raise VerdictError("the file is not the checkpoint", where=name, why=wrong)
    return found


def expected_linear(linear: QuantizedLinear) -> StoredLinear:
    """What the file must hold; for CMSIS-NN's kernel `scales` are multipliers and shifts, [O, 2]."""
    record, codes = linear.record, linear.codes.numpy()
    if record.input is None:
        return StoredLinear("dequantize_per_channel", codes, linear.scales.numpy())
    bias, numbers = bias_steps(linear), torch.stack(requantization(linear), dim=1)
    return StoredLinear(
        "quantized_conv2d", codes, numbers.numpy(), None if bias is None else bias.numpy(), record.input, record.output
    )
