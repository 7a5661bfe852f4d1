"""Reads a finished OpenVINO program back: which integers are really in it, found by following the graph from each
MatMul."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np
from openvino import Model, Node

from afq_export.errors import InputError
from afq_export.lower.stored import StoredLinear
from afq_export.runtime.openvino import read_model

GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
"""The property that makes the CPU plugin quantize the input of compressed linears, in groups of so many."""
CACHES = ("ReadValue", "Assign")


@dataclasses.dataclass(frozen=True)
class OpenvinoContent:
    """`linears` by name, the token rows when they are quantized; how often every operator stands in the file; all
    float constants by name; the properties and facts that it carries."""

    linears: dict[str, StoredLinear]
    rows: StoredLinear | None
    operators: dict[str, int]
    tensors: dict[str, np.ndarray]
    properties: dict[str, str]
    facts: dict[str, str]


def read_program(path: Path) -> OpenvinoContent:
    """Content of the program at `path` and its .bin. Raises InputError when it is no whole OpenVINO program."""
    model = read_model(path)
    properties = _texts(model, "runtime_options")
    nodes = list(model.get_ordered_ops())
    linears = {
        node.get_friendly_name(): _linear(node, properties) for node in nodes if node.get_type_name() == "MatMul"
    }
    lookups = [node for node in nodes if node.get_friendly_name() == "embed_tokens"]
    return OpenvinoContent(
        linears=linears,
        rows=next((_weight(node, 0) for node in lookups if _source(node, 0).get_type_name() != "Constant"), None),
        operators=dict(collections.Counter(node.get_type_name() for node in nodes)),
        tensors={node.get_friendly_name(): node.data for node in nodes if _is_float(node)},
        properties=properties,
        facts=_texts(model, "afq_export"),
    )


def _texts(model: Model, section: str) -> dict[str, str]:
    """The entries of a section of the model's own information."""
    found = model.get_rt_info()[section] if model.has_rt_info(section) else {}
    return {key: str(getattr(value, "value", value)) for key, value in found.items()}


def _linear(node: Node, properties: dict[str, str]) -> StoredLinear:
    """The linear whose product `node` is. Raises InputError when the pattern is not one that we write."""
    attributes = node.get_attributes()
    if attributes.get("transpose_a") or not attributes.get("transpose_b"):
        raise InputError("a MatMul with turned inputs", where=node.get_friendly_name())
    stored = _weight(node, 1)
    size = properties.get(GROUP_SIZE, "")
    activation = "float" if size == "0" else f"int8 g{size} dynamic" if size else "as the session says"
    followers = [target.get_node() for target in node.output(0).get_target_inputs()]
    bias = None
    if len(followers) == 1 and followers[0].get_type_name() == "Add":
        sides = [_source(followers[0], side) for side in (0, 1)]
        bias = next((side.data for side in sides if side.get_type_name() == "Constant"), None)
    return dataclasses.replace(stored, bias=bias, activation=activation)


def _weight(node: Node, side: int) -> StoredLinear:
    """What an input of `node` is decompressed from."""
    name, source = node.get_friendly_name(), _source(node, side)
    grouped = source.get_type_name() == "Reshape"
    product = _source(source, 0) if grouped else source
    convert = _source(product, 0) if product.get_type_name() == "Multiply" else product
    if convert.get_type_name() != "Convert" or _source(convert, 0).get_type_name() != "Constant":
        raise InputError("a float MatMul", where=name, why="its weight is not quantized as this package writes it")
    constant, scales = _source(convert, 0), _source(product, 1)
    if scales.get_type_name() != "Constant":
        raise InputError("a number of a linear is computed, not stored", where=name)
    element, shape = constant.get_element_type().get_type_name(), tuple(constant.shape)
    if element not in ("i4", "i8") or len(shape) != 2 + grouped:
        raise InputError("weights of another form", where=name, why=f"{element} {list(shape)}")
    grid = f"int{element[1:]} {f'g{shape[2]}' if grouped else 'per_channel'}"
    return StoredLinear(grid, codes_of(constant), scales.data.reshape(shape[0], -1), weight=grid)


def codes_of(constant: Node) -> np.ndarray:
    """Codes int8 [O, I] of a constant i8 or i4, two of which share a byte, the first in the low bits."""
    shape = tuple(constant.shape)
    if constant.get_element_type().get_type_name() == "i8":
        return constant.data.reshape(shape[0], -1)
    pairs = constant.data.view(np.uint8).reshape(-1)
    nibbles = np.stack((pairs & 15, pairs >> 4), -1).reshape(-1)[: int(np.prod(shape))].astype(np.int8)
    return ((nibbles ^ 8) - 8).reshape(shape[0], -1)


def _source(node: Node, side: int) -> Node:
    return node.input_value(side).get_node()


def _is_float(node: Node) -> bool:
    return node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "f32"
