"""Reads a finished graph back: which integers and grids are really in it, followed from each product with a weight."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, numpy_helper

from afq_export.errors import InputError, VerdictError
from afq_export.lower.stored import StoredLinear, difference
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear, StaticRange


@dataclasses.dataclass(frozen=True)
class GraphContent:
    """`linears` by name; how often every operator stands in the file, quantization left out."""

    linears: dict[str, StoredLinear]
    operators: dict[str, int]
    opset: int


def read_graph(path: Path) -> GraphContent:
    """Content of the graph at `path` and its external data. Raises InputError when it is no graph of this package."""
    try:
        model = onnx.load(path)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError("cannot read the ONNX file", where=str(path), why=str(error)) from error
    reader = _Reader(model)
    products = [node for node in model.graph.node if node.op_type == "MatMul" and reader.has_weight(node)]
    counted = collections.Counter(node.op_type for node in model.graph.node)
    moved = {name: count for name, count in counted.items() if not name.endswith("quantizeLinear")}
    moved.pop("QuantizeLinear", None)
    moved.pop("DequantizeLinear", None)
    opset = next((entry.version for entry in model.opset_import if not entry.domain), 0)
    return GraphContent({node.name: reader.linear(node) for node in products}, moved, opset)


def verify_graph(checkpoint: QuantizedCheckpoint, content: GraphContent, file: str) -> None:
    """Raises VerdictError naming the first linear that the file lacks or holds otherwise."""
    for name in checkpoint.records:
        found = content.linears.get(name)
        wrong = "it is not there" if found is None else difference(stored(checkpoint.linear(name)), found)
        if wrong:
            raise VerdictError("the file is not the checkpoint", where=f"{file}: {name}", why=wrong)
    if len(content.linears) != len(checkpoint.records):
        more = next(name for name in content.linears if name not in checkpoint.records)
        raise VerdictError("the file has linears of its own", where=f"{file}: {more}")


def stored(linear: QuantizedLinear) -> StoredLinear:
    """What a file must hold of a linear."""
    spec, record = linear.spec, linear.record
    group = f" in blocks of {spec.weight.group}" if spec.weight.group else ""
    bits = 4 if spec.weight.bits <= 4 else 8
    return StoredLinear(
        f"int{bits}{group}",
        linear.codes.numpy(),
        linear.scales.float().numpy(),
        None,
        record.input,
        record.output,
    )


class _Reader:
    """Who gives and who takes each value of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.takers: dict[str, list[NodeProto]] = collections.defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.takers[name].append(node)

    def has_weight(self, node: NodeProto) -> bool:
        """Whether the second factor is stored."""
        weight = self.producers.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            return False
        source = weight.input[0]
        return source in self.tensors or self.producers[source].input[0] in self.tensors

    def linear(self, node: NodeProto) -> StoredLinear:
        """The linear whose product `node` is."""
        weight = self.producers[node.input[1]]
        block, dtype = (
            next((a.i for a in weight.attribute if a.name == "block_size"), 0),
            self.array(weight.input[2]).dtype,
        )
        if block:
            blocks = self.producers[self.producers[weight.input[0]].input[1]]
            steps, unit = self.array(blocks.input[0]), self.array(blocks.input[1])
            scales = (steps.astype(np.float32) * unit).T
            if not np.array_equal(scales.T, self.array(weight.input[1])):
                raise InputError("quantized in other steps than dequantized", where=node.name)
            values = self.array(self.producers[weight.input[0]].input[0])
            codes = np.rint(values / np.repeat(scales.T, block, axis=0)[: len(values)])
        else:
            codes, scales = self.array(weight.input[0]), self.array(weight.input[1])[:, None]
        followers = [taker for taker in self.takers[node.output[0]] if taker.op_type == "QuantizeLinear"]
        if len(followers) != 1:
            raise InputError("a product that is not left on a grid", where=node.name)
        source, target = self.grid(self.producers[node.input[0]]), self.grid(followers[0])
        return StoredLinear(
            f"{dtype}{f' in blocks of {block}' if block else ''}",
            codes.T.astype(np.int8),
            scales,
            None,
            source,
            target,
            weight=f"{dtype} {f'g{block}' if block else 'per_channel'}",
            activation=f"int{source.bits} static",
        )

    def grid(self, node: NodeProto) -> StaticRange:
        """The grid of a QuantizeLinear or DequantizeLinear."""
        scale, zero_point = (self.array(name) for name in node.input[1:3])
        bits = zero_point.dtype.itemsize * 8
        return StaticRange(float(scale), int(zero_point) - (1 << (bits - 1)), bits)

    def array(self, name: str) -> np.ndarray:
        """A stored tensor's values. Raises InputError when it is computed."""
        if name not in self.tensors:
            raise InputError("a number of a linear is computed, not stored", where=name)
        return numpy_helper.to_array(self.tensors[name])
