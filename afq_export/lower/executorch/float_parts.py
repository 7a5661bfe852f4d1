"""The program's own float operators, run alone: what stands between the integer linears, to the last bit.

Norms and the MLP's nonlinearity are XNNPACK delegates written by the same functions as the program's; attention is the
custom operator that the program calls, on a cache of the same size. Elementwise products and sums are IEEE float32
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers torch.ops.llama)
from executorch.extension.pybindings import portable_lib
from torch import Tensor, nn

from afq_export.arch.attention import apply_rope
from afq_export.arch.config import DecoderConfig
from afq_export.lower.executorch.compose import call_segment, export_program
from afq_export.lower.executorch.decoder import CachedAttention
from afq_export.lower.executorch.graph import XnnGraph
from afq_export.lower.executorch.operand import Operand, activate
from afq_export.lower.executorch.segments import Segment, XnnOps, write_hadamard
from afq_export.quantize.checkpoint import QuantizedLinear

ROWS = 128
"""Rows of one call; the last one is padded."""


class ExecutorchFloatParts:
    """`validate.rungs.FloatParts` of a program with a KV cache of `context` tokens, called with `prefill` at a time."""

    name = "executorch"

    def __init__(self, context: int, prefill: int) -> None:
        self.context, self.prefill = context, prefill
        self._programs: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}
        self._attention: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None

    def norm(self, config: DecoderConfig, weights: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
        bare = XnnOps(config, {}, {}, {})
        y = self._run("norm", lambda operand: bare.norm(role, operand), x) * weights[f"{role}.weight"]
        bias = weights.get(f"{role}.bias")
        return y if bias is None else y + bias

    def linear(self, linear: QuantizedLinear, x: Tensor) -> Tensor | None:
        return None  # the integer models are exact on this host; where they are not, the difference is to be seen

    def rotate(self, x_BTHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return apply_rope(x_BTHd, *rope)  # products and sums that XNNPACK runs one by one

    def activation(self, config: DecoderConfig, x: Tensor) -> Tensor:
        return self._run("activation", lambda operand: activate(config.activation, operand), x)

    def hadamard(self, x: Tensor, size: int) -> Tensor:
        return self._run(f"hadamard {size}", lambda operand: write_hadamard(operand, size), x)

    def attention(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        return torch.stack([self._attend(*window) for window in zip(q_BTHd, k_BTKd, v_BTKd, strict=True)])

    def _attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """One sequence, in the calls that a session makes of it."""
        if self._attention is None:
            heads = q_THd.shape[1], k_TKd.shape[1]
            self._attention = _compile_attention(*heads, q_THd.shape[2], self.context, self.prefill)
        calls = zip(*(tensor.split(self.prefill) for tensor in (q_THd, k_TKd, v_TKd)), strict=True)
        return torch.cat([self._attention(index * self.prefill, *call) for index, call in enumerate(calls)])

    def _run(self, what: str, write: Callable[[Operand], Operand], x: Tensor) -> Tensor:
        """An operator over the last dimension of `x`; one program per width."""
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        key = (what, width)
        if key not in self._programs:
            self._programs[key] = _compile(write, width)
        padded = torch.cat((rows, rows.new_zeros(-len(rows) % ROWS, width)))
        done = torch.cat([self._programs[key](part) for part in padded.split(ROWS)])
        return done[: len(rows)].view(x.shape)


def _compile(write: Callable[[Operand], Operand], width: int) -> Callable[[Tensor], Tensor]:
    """A program of one delegate, float32 [ROWS, width] to the same."""
    graph = XnnGraph()
    result = write(Operand(graph, graph.input((1, ROWS, width))))
    graph.output(result.value)
    segment = Segment("float_part", ((1, ROWS, width),), ((1, ROWS, width),), graph.finish())
    buffer = export_program(_Part(segment), (torch.zeros(1, ROWS, width),), [segment]).buffer
    module = portable_lib._load_for_executorch_from_buffer(buffer)

    def run(x: Tensor, _keep: bytes = buffer) -> Tensor:
        return module.forward([x[None].contiguous()])[0][0].clone()

    return run


def _compile_attention(
    heads: int, kv_heads: int, head_dim: int, context: int, prefill: int
) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """A program of one block's cache and attention: start, q [T, H, d], k and v [T, K, d] to [T, H, d]."""
    module = _Attention(CachedAttention(kv_heads, head_dim, context), context)
    query, key = (torch.zeros(1, 2, count, head_dim) for count in (heads, kv_heads))
    tokens = torch.export.Dim("tokens", min=1, max=prefill)
    shapes = {"q": {1: tokens}, "k": {1: tokens}, "v": {1: tokens}, "position": None}
    example = (query, key, key.clone(), torch.zeros(1, dtype=torch.int64))
    buffer = export_program(module, example, [], dynamic_shapes=shapes).buffer
    loaded = portable_lib._load_for_executorch_from_buffer(buffer)

    def attend(start: int, q: Tensor, k: Tensor, v: Tensor, _keep: bytes = buffer) -> Tensor:
        inputs = [tensor[None].contiguous() for tensor in (q, k, v)]
        return loaded.forward([*inputs, torch.tensor([start])])[0][0].clone()

    return attend


class _Attention(nn.Module):
    """One block's attention and nothing else."""

    def __init__(self, cached: CachedAttention, context: int) -> None:
        super().__init__()
        self.cached, self.context = cached, context

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        start = position[0].item()
        torch._check(start >= 0)
        torch._check(start + q.shape[1] <= self.context)
        return self.cached(q, k, v, start)


class _Part(nn.Module):
    """The segment and nothing else."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, x: Tensor) -> Tensor:
        return call_segment(self.segment, [x])[0]
