"""Standalone ExecuTorch programs of single linears, independent of afq_export/lower: the integer models' witness."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.quantize.checkpoint import QuantizedLinear, StaticRange

MAX_TOKENS = 64


class Linears(torch.nn.Module):
    """One quantize-dequantize linear per input, in the patterns that the XNNPACK partitioner turns into integers."""

    def __init__(self, linears: Sequence[QuantizedLinear]) -> None:
        super().__init__()
        self.linears = linears
        for index, linear in enumerate(linears):
            group = linear.spec.weight.group
            scales = linear.scales if group else linear.scales[:, 0]
            self.register_buffer(f"codes{index}", linear.codes)
            self.register_buffer(f"scales{index}", scales.contiguous())
            self.register_buffer(f"zeros{index}", torch.zeros_like(scales, dtype=torch.int8 if group else torch.int64))
            self.register_buffer(f"bias{index}", linear.bias)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._linear(index, x) for index, x in enumerate(inputs))

    def _linear(self, index: int, x: Tensor) -> Tensor:
        ops, record = torch.ops.quantized_decomposed, self.linears[index].record
        codes, scales, zeros, bias = (getattr(self, f"{part}{index}") for part in ("codes", "scales", "zeros", "bias"))
        weight_grid = record.spec.weight
        limits = (weight_grid.qmin, weight_grid.qmax, torch.int8)
        if weight_grid.group:
            weight = ops.dequantize_per_channel_group(codes, scales, zeros, *limits, weight_grid.group, torch.float32)
        else:
            weight = ops.dequantize_per_channel(codes, scales, zeros, 0, *limits)
        if record.input is None:
            scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
            x = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
            x = ops.dequantize_per_token(x, scale, zero, -128, 127, torch.int8, torch.float32)
            return F.linear(x, weight, bias)
        return _through(record.output, F.linear(_through(record.input, x), weight, bias))


def _through(grid: StaticRange, x: Tensor) -> Tensor:
    """Quantized and dequantized."""
    ops, where = torch.ops.quantized_decomposed, (grid.scale, grid.zero_point, -128, 127, torch.int8)
    return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *where), *where)


def compile_linears(linears: Sequence[QuantizedLinear]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A function that runs the linears in XNNPACK, one input [M, I] each, the same M up to MAX_TOKENS.

    Asserts that nothing but the delegate is left in the program: what runs is the integer kernel.
    """
    pytest.importorskip("executorch")
    import torch.ao.quantization.fx._decomposed
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib

    inputs = tuple(torch.randn(4, linear.spec.inputs) for linear in linears)
    tokens = torch.export.Dim("tokens", min=1, max=MAX_TOKENS)
    with torch.no_grad():
        program = torch.export.export(
            Linears(linears), inputs, dynamic_shapes=(tuple({0: tokens} for _ in linears),), strict=False
        )
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
    nodes = edge.exported_program().graph_module.graph.nodes
    left = {str(node.target) for node in nodes if node.op == "call_function"}
    assert left <= {"executorch_call_delegate", "<built-in function getitem>"}, left
    buffer = edge.to_executorch().buffer
    module = portable_lib._load_for_executorch_from_buffer(buffer)

    def run(xs: Sequence[Tensor]) -> list[Tensor]:
        return [out.clone() for out in module.forward([x.contiguous() for x in xs])]

    run.buffer = buffer  # the module reads its constants from it
    return run
