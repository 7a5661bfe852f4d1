"""The file's own float operators, run alone: what stands between the integer linears, to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.lower.onnx.decoder import (
    BATCH,
    MASKED,
    SEQUENCE,
    write_attention,
    write_attention_over,
    write_norm,
    write_rotation,
)
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.hadamard import write_hadamard, write_product
from afq_export.lower.onnx.operand import Operand, Shape, activate
from afq_export.lower.onnx.parts import Part, part_model
from afq_export.lower.onnx.probe import linears_model
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.runtime.onnxruntime import RunOptions
from afq_export.spec.online import MATRIX_KIND
from afq_export.spec.target import TargetProfile

LINEARS = 16
"""Linears that are kept loaded: more than a block has."""
MATRICES = 4
"""Matrices behind norms that are kept loaded: those of two blocks."""


class OnnxFloatParts:
    """`validate.rungs.FloatParts` of a file with opset `opset` for `target` that is run with `options`.

    `kept`: attention itself keeps keys and values; a quantized cache gives it all of them in every call.
    """

    name = "onnxruntime"

    def __init__(self, opset: int, target: TargetProfile, options: RunOptions, kept: bool = True) -> None:
        self.opset, self.target, self.options, self.kept = opset, target, options, kept
        self._parts: dict[tuple, Part] = {}
        self._linears: dict[str, Part] = {}
        self._matrices: dict[str, Part] = {}

    def linear(self, linear: QuantizedLinear, x: Tensor) -> Tensor | None:
        """MatMulNBits alone, in the calls that a session makes: it adds floats in an order that depends on its rows."""
        if not self.target.kernel(linear.record.kernel).max_relative_error:
            return None
        name = linear.spec.name
        if name not in self._linears:
            if len(self._linears) == LINEARS:
                self._linears.clear()
            self._linears[name] = Part(linears_model([linear], self.target), self.options)
        return self._in_calls(self._linears[name], f"{name}.x", x)

    def norm(self, config: DecoderConfig, weights: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
        named = {kind: weights[f"{role}.{kind}"] for kind in ("weight", "bias") if f"{role}.{kind}" in weights}
        inputs: dict[str, Shape] = dict.fromkeys(named, (x.shape[-1],))
        part = self._part(("norm", x.shape[-1], *named), x, inputs, lambda x: write_norm(config, x, *named))
        y, matrix = _run(part, x, **named), weights.get(f"{role}.{MATRIX_KIND}")
        return y if matrix is None else self._product(y, matrix)

    def rotate(self, x_BTHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        heads, width = x_BTHd.shape[2:]
        flat = x_BTHd.flatten(2)
        inputs: dict[str, Shape] = {"cos": ("positions", width // 2), "sin": ("positions", width // 2)}

        def write(x: Operand) -> Operand:
            return write_rotation(x.view(BATCH, SEQUENCE, heads, width), ("cos", "sin"), "position_ids")

        where = {"position_ids": (BATCH, SEQUENCE)}
        part = self._part(("rotate", heads, width), flat, inputs | where, write, integers=("position_ids",))
        cos, sin = (table[:, : width // 2] for table in rope)
        positions = torch.arange(len(cos)).expand(len(flat), -1)
        return _run(part, flat, cos=cos, sin=sin, position_ids=positions).view(x_BTHd.shape)

    def activation(self, config: DecoderConfig, x: Tensor) -> Tensor:
        part = self._part(("activation", x.shape[-1]), x, {}, lambda x: activate(config.activation, x))
        return _run(part, x)

    def hadamard(self, x: Tensor, size: int) -> Tensor:
        part = self._part(("hadamard", size), x, {}, lambda x: write_hadamard(x, size))
        return _run(part, x).view(x.shape)

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`x` [N, T, D] times a matrix that the model has: the runtime packs such ones, and may add in another order
        than for one that it is given. In the calls that a session makes, since a single row may have its own kernel."""
        key = hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest()
        if key not in self._matrices:
            if len(self._matrices) == MATRICES:
                self._matrices.clear()
            graph, shape = OnnxGraph(), (BATCH, SEQUENCE, x.shape[-1])
            y = write_product(Operand.of(graph, "x", shape), graph.tensor("matrix", matrix.numpy()))
            self._matrices[key] = Part(part_model(graph, {"x": shape}, {y.value: shape}, self.opset), self.options)
        return self._in_calls(self._matrices[key], "x", x)

    def _in_calls(self, model: Part, name: str, x_NTI: Tensor) -> Tensor:
        """`model` [1, rows, I] -> [1, rows, O] over windows, its input `name`, in the calls that a session makes."""
        calls = (part for window in x_NTI for part in window.split(self.options.prefill))
        rows = torch.cat([torch.from_numpy(model(**{name: part[None].numpy()})[0][0]) for part in calls])
        return rows.view(*x_NTI.shape[:-1], -1)

    def attention(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        return torch.stack([self._attend(*window) for window in zip(q_BTHd, k_BTKd, v_BTKd, strict=True)])

    def _attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """One sequence, in the calls that a session makes of it."""
        heads, width, kv_heads = *q_THd.shape[1:], k_TKd.shape[1]
        if not self.kept:
            return self._attend_over(q_THd, k_TKd, v_TKd)
        part = self._attention(heads, kv_heads, width)
        cache = {name: np.zeros((1, kv_heads, 0, width), np.float32) for name in ("past.key", "past.value")}
        rows = []
        for q, k, v in zip(
            *(tensor.flatten(1).split(self.options.prefill) for tensor in (q_THd, k_TKd, v_TKd)), strict=True
        ):
            mask = _mask(cache["past.key"].shape[2], len(q))
            given = {name: tensor[None].numpy() for name, tensor in (("q", q), ("k", k), ("v", v))}
            y, *present = part(**given, mask=mask, **cache)
            cache = dict(zip(cache, present, strict=True))
            rows.append(torch.from_numpy(y[0]))
        return torch.cat(rows).view(q_THd.shape)

    def _attend_over(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """The same where every call is given the keys and values of all tokens up to its last."""
        (heads, width), kv_heads = q_THd.shape[1:], k_TKd.shape[1]
        key = ("attention over", heads, kv_heads, width)
        if key not in self._parts:
            graph, flat = OnnxGraph(), (BATCH, SEQUENCE, heads * width)
            q = Operand.of(graph, "q", flat).view(BATCH, SEQUENCE, heads, width)
            y = write_attention_over(q, "keys", "values", "mask")
            inputs: dict[str, Shape] = {"q": flat, "mask": (BATCH, 1, SEQUENCE, "total")}
            inputs |= dict.fromkeys(("keys", "values"), (BATCH, kv_heads, "total", width))
            self._parts[key] = Part(part_model(graph, inputs, {y.value: y.stored}, self.opset), self.options)
        keys, values = (tensor.transpose(0, 1)[None].numpy() for tensor in (k_TKd, v_TKd))
        rows, past = [], 0
        for q in q_THd.flatten(1).split(self.options.prefill):
            end, mask = past + len(q), _mask(past, len(q))
            given = {"q": q[None].numpy(), "keys": keys[:, :, :end], "values": values[:, :, :end], "mask": mask}
            rows.append(torch.from_numpy(self._parts[key](**given)[0][0]))
            past = end
        return torch.cat(rows)

    def _attention(self, heads: int, kv_heads: int, width: int) -> Part:
        key = ("attention", heads, kv_heads, width)
        if key not in self._parts:
            graph, flat = OnnxGraph(), (BATCH, SEQUENCE)
            sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
            q, k, v = (
                Operand.of(graph, name, (*flat, count * width)).view(*flat, count, width)
                for name, count in sizes.items()
            )
            y = write_attention(q, k, v, "mask", ("past.key", "past.value"), ["present.key", "present.value"])
            inputs: dict[str, Shape] = {name: (*flat, count * width) for name, count in sizes.items()}
            inputs |= {"mask": (BATCH, 1, SEQUENCE, "total")}
            inputs |= {f"past.{kind}": (BATCH, kv_heads, "past", width) for kind in ("key", "value")}
            outputs: dict[str, Shape] = {y.value: y.stored}
            outputs |= {f"present.{kind}": (BATCH, kv_heads, "total", width) for kind in ("key", "value")}
            self._parts[key] = Part(part_model(graph, inputs, outputs, self.opset), self.options)
        return self._parts[key]

    def _part(
        self,
        key: tuple,
        x: Tensor,
        inputs: dict[str, Shape],
        write: Callable[[Operand], Operand],
        integers: tuple[str, ...] = (),
    ) -> Part:
        """The model of an operator on `x`, made once for each `key` and shape: q and k norms see other heads."""
        key = (*key, *x.shape[2:])
        if key not in self._parts:
            shape = (BATCH, SEQUENCE, *x.shape[2:])
            graph = OnnxGraph()
            y = write(Operand.of(graph, "x", shape))
            model = part_model(graph, {"x": shape} | inputs, {y.value: y.stored}, self.opset, integers)
            self._parts[key] = Part(model, self.options)
        return self._parts[key]


def _mask(past: int, tokens: int) -> np.ndarray:
    """float32 [1, 1, T, past + T]: what `decoder.write_mask` gives for tokens that stand after `past` others."""
    seen = np.arange(past + tokens)[None] <= np.arange(past, past + tokens)[:, None]
    return np.where(seen, np.float32(0), np.float32(MASKED))[None, None]


def _run(part: Part, x: Tensor, **more: Tensor) -> Tensor:
    """The single result of a part."""
    arrays = {name: tensor.numpy() for name, tensor in more.items()}
    return torch.from_numpy(part(x=x.numpy(), **arrays)[0])
