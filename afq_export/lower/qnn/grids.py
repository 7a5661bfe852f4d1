"""Puts every float tensor of a graph on its grid: a quantize and a dequantize node behind each operator.

Rule 1  what an operator computes is quantized to the grid noted for it, and dequantized for those who take it.
Rule 2  operators that only move numbers keep the grid of what they move.
Rule 3  float constants get a grid of their own, on which both ends and 0 are codes; they are stored as codes.
Rule 4  a value that is to be on another grid is quantized to that one as well, by no operator (AGAIN).
Rule 5  inputs and outputs of the graph are codes.
Codes are unsigned, as the hardware has them: `StaticRange`'s plus 2^(bits - 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from onnx import NodeProto, helper, numpy_helper

from afq_export.errors import InputError
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.quantize.checkpoint import StaticRange
from afq_export.quantize.tensors import constant_grid

MOVERS = ("Reshape", "Transpose", "Slice", "Concat")
AGAIN = "Again"
"""Stands in the float graph for a change of grid; there is no such operator in the file."""
STORED = {8: np.uint8, 16: np.uint16}
"""Bits of an activation's code -> its type in the file."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A grid as the file has it: float32 scale, zero point in the codes' type."""

    scale: np.ndarray
    zero_point: np.ndarray

    @staticmethod
    def of(grid: StaticRange) -> Stored:
        """`grid` with unsigned codes."""
        return Stored(np.array(grid.scale, np.float32), np.array(grid.zero_point - grid.qmin, STORED[grid.bits]))

    def codes(self, values: np.ndarray) -> np.ndarray:
        """Unsigned codes of float values: divided, rounded half to even, saturated (QuantizeLinear)."""
        limits = np.iinfo(self.zero_point.dtype)
        steps = np.rint(np.asarray(values, np.float32) / self.scale) + np.float32(self.zero_point)
        return np.clip(steps, limits.min, limits.max).astype(self.zero_point.dtype)

    def values(self, codes: np.ndarray) -> np.ndarray:
        """Float32 of codes."""
        return (codes.astype(np.int32) - np.int32(self.zero_point)).astype(np.float32) * self.scale


def quantized(
    graph: OnnxGraph, grids: Mapping[str, StaticRange], outputs: Mapping[str, str], bits: int
) -> tuple[OnnxGraph, dict[str, StaticRange]]:
    """`graph` with all its floats on grids, and the grid of every value of it.

    `grids`: value -> grid, of the graph's inputs and of what operators compute; `outputs`: value -> name of the output
    that holds its codes. Weights' quantize and dequantize nodes stay. Raises InputError for a value without a grid.
    """
    work = _Work(graph, dict(grids), dict(outputs), bits)
    for node in graph.nodes:
        work.take(node)
    return work.made, work.grids


class _Work:
    def __init__(self, graph: OnnxGraph, grids: dict[str, StaticRange], outputs: dict[str, str], bits: int) -> None:
        self.graph, self.grids, self.outputs, self.bits = graph, grids, outputs, bits
        self.made = OnnxGraph(graph.scope)
        self.values: dict[str, str] = {}
        """Value of the float graph -> value of the new one that stands for it."""

    def take(self, node: NodeProto) -> None:
        """Writes `node` and what belongs behind it."""
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            self._copy(node)
            return
        inputs = [self._input(name) for name in node.input]
        if node.op_type == AGAIN:
            if self.grids[node.output[0]] == self.grids[node.input[0]]:
                self.values[node.output[0]] = inputs[0]
                return
            value = inputs[0]
        else:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            value = self.made.node(node.op_type, inputs, node.output[0], **attributes)
        if node.op_type in MOVERS:
            self.grids.setdefault(node.output[0], self.grids[node.input[0]])
        grid = self.grids.get(node.output[0])
        if grid is None:
            raise InputError("a tensor has no grid", where=node.output[0], why="calibration has not seen it")
        scale, zero = self._numbers(grid)
        name = self.outputs.get(node.output[0], f"{value}.quantized")
        codes = self.made.node("QuantizeLinear", [value, scale, zero], name)
        self.grids[name] = grid
        self.values[node.output[0]] = self.made.node("DequantizeLinear", [codes, scale, zero], f"{value}.grid")

    def _input(self, name: str) -> str:
        if name in self.values:
            return self.values[name]
        if name in self.graph.initializers:
            self.values[name] = self._constant(name)
        elif name in self.grids:  # an input of the graph: codes
            scale, zero = self._numbers(self.grids[name])
            self.values[name] = self.made.node("DequantizeLinear", [name, scale, zero], f"{name}.grid")
        else:
            raise InputError("a tensor has no grid", where=name, why="it is neither computed nor an input with one")
        return self.values[name]

    def _constant(self, name: str) -> str:
        array = numpy_helper.to_array(self.graph.initializers[name]).copy()
        if array.dtype != np.float32:
            return self.made.tensor(name, array)
        self.grids[name] = constant_grid(torch.from_numpy(array), self.bits)
        stored = Stored.of(self.grids[name])
        codes = self.made.tensor(name, stored.codes(array))
        return self.made.node("DequantizeLinear", [codes, *self._numbers(self.grids[name])], f"{name}.grid")

    def _copy(self, node: NodeProto) -> None:
        """A weight: codes, scales, zero points and the node as they are."""
        for name in node.input:
            if name in self.graph.initializers:
                self.made.initializers[name] = self.graph.initializers[name]
        self.made.nodes.append(node)
        self.values[node.output[0]] = node.output[0]

    def _numbers(self, grid: StaticRange) -> tuple[str, str]:
        stored = Stored.of(grid)
        return self.made.constant(stored.scale, "scale"), self.made.constant(stored.zero_point, "zero_point")
