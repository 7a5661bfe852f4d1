"""The program's own float operators, run alone: what stands between the integer linears, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import openvino
import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.lower.onnx.decoder import BATCH, MASKED, SEQUENCE
from afq_export.lower.onnx.operand import Operand, Shape
from afq_export.lower.openvino.decoder import write_activation, write_attention, write_norm, write_rotation
from afq_export.lower.openvino.graph import OpenvinoGraph
from afq_export.lower.openvino.probe import linears_model
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.runtime.openvino import RunOptions, compiled
from afq_export.spec.target import TargetProfile

LINEARS = 16
"""Linears that are kept compiled: more than a block has."""
EXACT = "openvino.dynamic_per_group"
"""The arithmetic that has one order of additions, which its model follows."""


class OpenvinoFloatParts:
    """`validate.rungs.FloatParts` of a program for `target` that is run with `options`."""

    name = "openvino"

    def __init__(self, target: TargetProfile, options: RunOptions) -> None:
        self.target, self.options = target, options
        self._parts: dict[tuple, openvino.CompiledModel] = {}
        self._linears: dict[str, openvino.CompiledModel] = {}

    def linear(self, linear: QuantizedLinear, x: Tensor) -> Tensor | None:
        """A float32 product alone, in the calls that a session makes: its sums have no order that a model follows."""
        if self.target.kernel(linear.record.kernel).arithmetic == EXACT:
            return None
        name = linear.spec.name
        if name not in self._linears:
            if len(self._linears) == LINEARS:
                self._linears.clear()
            self._linears[name] = compiled(linears_model([linear], self.target), self.options)
        calls = (part for window in x for part in window.split(self.options.prefill))
        rows = [_first(self._linears[name]({f"{name}.x": part[None].numpy()}))[0] for part in calls]
        return torch.cat(rows).view(*x.shape[:-1], linear.spec.outputs)

    def norm(self, config: DecoderConfig, weights: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
        named = {kind: weights[f"{role}.{kind}"] for kind in ("weight", "bias") if f"{role}.{kind}" in weights}
        constants = {kind: tensor.float().numpy() for kind, tensor in named.items()}
        digest = tuple(hash(array.tobytes()) for array in constants.values())

        def write(x: Operand) -> Operand:
            return write_norm(config, x, *(x.graph.tensor(kind, array) for kind, array in constants.items()))

        return self._run(("norm", *digest), x, {}, write)

    def rotate(self, x_BTHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        shape = (BATCH, SEQUENCE, 1, x_BTHd.shape[-1])
        tables = {
            name: table[None, :, None].expand(len(x_BTHd), -1, -1, -1)
            for name, table in zip(("cos", "sin"), rope, strict=True)
        }
        return self._run(
            ("rotate",),
            x_BTHd,
            {name: (shape, table) for name, table in tables.items()},
            lambda x: write_rotation(x, ("cos", "sin")),
        )

    def activation(self, config: DecoderConfig, x: Tensor) -> Tensor:
        return self._run(("activation",), x, {}, lambda x: write_activation(config.activation, x))

    def attention(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        return torch.stack([self._attend(*window) for window in zip(q_BTHd, k_BTKd, v_BTKd, strict=True)])

    def _attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """One sequence, in the calls that a session makes of it."""
        request = self._attention(*q_THd.shape[1:], k_TKd.shape[1]).create_infer_request()
        rows, past = [], 0
        for q, k, v in zip(*(tensor.split(self.options.prefill) for tensor in (q_THd, k_TKd, v_TKd)), strict=True):
            tokens = len(q)
            seen = np.arange(past + tokens)[None] <= np.arange(past, past + tokens)[:, None]
            feed = {name: tensor[None].contiguous().numpy() for name, tensor in (("q", q), ("k", k), ("v", v))}
            feed["mask"] = np.where(seen, np.float32(0), np.float32(MASKED))[None, None]
            feed |= {"beam_idx": np.zeros(1, np.int32), "input_ids": np.zeros((1, tokens), np.int64)}
            rows.append(_first(request.infer(feed))[0])
            past += tokens
        return torch.cat(rows)

    def _attention(self, heads: int, width: int, kv_heads: int) -> openvino.CompiledModel:
        key = ("attention", heads, kv_heads, width)
        if key not in self._parts:
            graph = OpenvinoGraph()
            q, k, v = (
                _operand(graph, name, (BATCH, SEQUENCE, count, width))
                for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            graph.parameter("mask", (BATCH, 1, SEQUENCE, "total"), np.float32)
            graph.parameter("beam_idx", (BATCH,), np.int32)
            graph.parameter("input_ids", (BATCH, SEQUENCE), np.int64)
            y = write_attention(q, k, v, "mask", ("past.key", "past.value"))
            self._parts[key] = compiled(graph.model({"y": y.as_stored(y.shape)}, "attention"), self.options)
        return self._parts[key]

    def _run(
        self, key: tuple, x: Tensor, more: Mapping[str, tuple[Shape, Tensor]], write: Callable[[Operand], Operand]
    ) -> Tensor:
        """What `write` makes of `x` and the inputs `more`; compiled once for each `key` and inner shape."""
        key = (*key, *x.shape[2:])
        if key not in self._parts:
            graph = OpenvinoGraph()
            operand = _operand(graph, "x", (BATCH, SEQUENCE, *x.shape[2:]))
            for name, (shape, _) in more.items():
                graph.parameter(name, shape, np.float32)
            y = write(operand)
            self._parts[key] = compiled(graph.model({"y": y.as_stored(y.shape)}, "part"), self.options)
        arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, (_, tensor) in more.items()}
        return _first(self._parts[key]({"x": np.ascontiguousarray(x.numpy())} | arrays))


def _operand(graph: OpenvinoGraph, name: str, shape: Shape) -> Operand:
    return Operand.of(graph, graph.parameter(name, shape, np.float32), shape)


def _first(results: Mapping) -> Tensor:
    """The single result, as a tensor of its own."""
    return torch.from_numpy(results["y"].copy() if "y" in results else next(iter(results.values())).copy())
