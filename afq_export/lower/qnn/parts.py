"""What a block is made of besides linears and norms, as ONNX nodes with static shapes (`arch.static.Parts`)."""

from __future__ import annotations

import math

import numpy as np

from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.operand import Operand, Shape
from afq_export.lower.qnn.grids import AGAIN


class GraphParts:
    """`arch.static.Parts` on operands of one block of a graph for calls of some tokens after a cache of `past` others.

    Inputs of the graph are named `cos`, `sin`, `mask`, `past.<block>.key`, `past.<block>.value`; what a call adds to
    the cache is noted in `presents`. The cache is flat, [1, rows, columns of all tokens]: a reshape between Transpose
    and output keeps ONNX Runtime from moving the Transpose behind the quantization, where the provider refuses it.
    """

    def __init__(self, graph: OnnxGraph, block: int, past: int, presents: dict[str, Operand]) -> None:
        self.graph, self.block, self.past, self.presents = graph, block, past, presents

    def tables(self, rope: tuple[Operand, Operand]) -> tuple[Operand, Operand]:
        return rope

    def turn(self, x: Operand) -> Operand:
        value, width = x.as_stored(x.shape), x.shape[-1]
        ends = [(width // 2, width), (0, width // 2)]
        halves = [
            self.graph.node("Slice", [value, *(self.graph.integers(end) for end in pair), self.graph.integers(-1)])
            for pair in ends
        ]
        return self._of("Concat", halves, x.shape, axis=len(x.shape) - 1)

    def scale(self, x: Operand, factor: float) -> Operand:
        return x * float(np.float32(factor))

    def sigmoid(self, x: Operand) -> Operand:
        return x.unary("Sigmoid")

    def softmax(self, x: Operand) -> Operand:
        return x.unary("Softmax", axis=-1)

    def permute(self, x: Operand, axes: tuple[int, ...]) -> Operand:
        shape = tuple(x.shape[axis] for axis in axes)
        if [axis for axis in axes if x.shape[axis] != 1] == [axis for axis, size in enumerate(x.shape) if size != 1]:
            return x.view(shape)
        return self._of("Transpose", [x.as_stored(x.shape)], shape, perm=list(axes))

    def matmul(self, x: Operand, y: Operand) -> Operand:
        inputs = [x.as_stored(x.shape), y.as_stored(y.shape)]
        return self._of("MatMul", inputs, (*x.shape[:-1], y.shape[-1]))

    def again(self, x: Operand) -> Operand:
        return Operand(self.graph, self.graph.node(AGAIN, [x.value]), x.shape, x.stored)

    def remember(self, name: str, x: Operand, axis: int) -> Operand:
        shape = tuple(size + self.past if at == axis else size for at, size in enumerate(x.shape))
        rows = math.prod(x.shape[1:axis])
        flat = (1, rows, math.prod(x.shape[axis:]))
        new = Operand.of(self.graph, x.as_stored(flat), flat)
        self.presents[f"{self.block}.{name}"] = new
        whole = (1, rows, math.prod(shape[axis:]))
        return self._of("Concat", [f"past.{self.block}.{name}", new.value], whole, axis=2).view(shape)

    def mask(self, scores: Operand) -> Operand:
        return Operand.of(self.graph, "mask", (1, 1, *scores.shape[-2:]))

    def _of(self, operator: str, inputs: list[str], shape: Shape, **attributes: object) -> Operand:
        return Operand.of(self.graph, self.graph.node(operator, inputs, **attributes), shape)
