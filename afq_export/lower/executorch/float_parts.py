"""The program's own float operators, run alone: what stands between the integer linears, to the last bit.

Norms and the MLP's nonlinearity are XNNPACK delegates written by the same functions as the program's; attention is the
custom operator that the program calls. Elementwise products and sums are IEEE float32 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers torch.ops.llama)
from executorch.extension.pybindings import portable_lib
from torch import Tensor, nn

from afq_export.arch.config import DecoderConfig
from afq_export.lower.executorch.compose import call_segment, export_program
from afq_export.lower.executorch.graph import XnnGraph
from afq_export.lower.executorch.operand import Operand, activate
from afq_export.lower.executorch.segments import Segment, XnnOps

ROWS = 128
"""Rows of one call; the last one is padded."""


class ExecutorchFloatParts:
    """`validate.rungs.FloatParts` of a program with a KV cache of `context` tokens, called with `prefill` at a time."""

    name = "executorch"

    def __init__(self, context: int, prefill: int) -> None:
        self.context, self.prefill = context, prefill
        self._programs: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}

    def norm(self, config: DecoderConfig, weights: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
        bare = XnnOps(config, {}, {}, {})
        y = self._run("norm", lambda operand: bare.norm(role, operand), x) * weights[f"{role}.weight"]
        bias = weights.get(f"{role}.bias")
        return y if bias is None else y + bias

    def activation(self, config: DecoderConfig, x: Tensor) -> Tensor:
        return self._run("activation", lambda operand: activate(config.activation, operand), x)

    def attention(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        return torch.stack([self._attend(*window) for window in zip(q_BTHd, k_BTKd, v_BTKd, strict=True)])

    def _attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """One sequence, in the calls that a session makes of it."""
        tokens = len(q_THd)
        keys, values = (torch.zeros(1, self.context, *t.shape[1:]) for t in (k_TKd, v_TKd))
        keys[0, :tokens], values[0, :tokens] = k_TKd, v_TKd
        calls = [
            torch.ops.llama.custom_sdpa(part[None].contiguous(), keys, values, start, None, 0.0, True)[0]
            for start, part in zip(range(0, tokens, self.prefill), q_THd.split(self.prefill), strict=True)
        ]
        return torch.cat(calls)

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


class _Part(nn.Module):
    """The segment and nothing else."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, x: Tensor) -> Tensor:
        return call_segment(self.segment, [x])[0]
