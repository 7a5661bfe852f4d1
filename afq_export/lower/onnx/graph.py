"""An ONNX graph under construction: nodes in running order, tensors by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import save_external_data, set_external_data

Written = TypeVar("Written")

SHARED_BYTES = 1024
"""Constants up to this size are looked up by their content, so that equal ones are one tensor."""
SMALL = 1024
"""Bytes of a tensor that stays in the file when the others go beside it."""


class OnnxGraph:
    """Collects nodes and initializers. Value names are unique; a node is named after the first value it gives.

    `scope` is the part of the model that is being written: it stands in front of names that nobody chose. With
    `beside`, tensors are written to that file as they come and only their places are kept in memory.
    """

    def __init__(self, scope: str = "model", beside: Path | None = None) -> None:
        self.scope, self.beside = scope, beside
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._constants: dict[tuple, str] = {}
        self._written: dict[tuple, Any] = {}
        self._taken: set[str] = set()

    def node(self, operator: str, inputs: list[str], name: str = "", **attributes: Any) -> str:
        """Appends a node with one result; returns the result's name, which begins with `name`."""
        return self.nodes_of(operator, inputs, [name or f"{self.scope}.{operator.lower()}"], **attributes)[0]

    def nodes_of(self, operator: str, inputs: list[str], names: list[str], **attributes: Any) -> list[str]:
        """Appends a node with a result per name. Empty input names are left-out optional inputs."""
        outputs = [self._unique(name) for name in names]
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
        return outputs

    def once(self, key: tuple, write: Callable[[], Written]) -> Written:
        """What `write` gives; with the same key the first result again, and nothing is written."""
        if key not in self._written:
            self._written[key] = write()
        return self._written[key]

    def tensor(self, name: str, array: np.ndarray) -> str:
        """An initializer called `name`. The same name twice is the same tensor."""
        if name not in self.initializers:
            self._taken.add(name)
            self.initializers[name] = self._stored(numpy_helper.from_array(array, name))
        return name

    def constant(self, array: np.ndarray, name: str = "constant") -> str:
        """A small initializer; equal ones are shared."""
        key = (array.dtype.str, str(array.dtype), array.shape, array.tobytes())
        if array.nbytes > SHARED_BYTES or key not in self._constants:
            self._constants[key] = self.tensor(self._unique(name), array)
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """A constant int64 [n]."""
        return self.constant(np.array(values, np.int64), "sizes")

    def scalar(self, value: int) -> str:
        """A constant int64 without dimensions."""
        return self.constant(np.array(value, np.int64), "number")

    def _stored(self, tensor: TensorProto) -> TensorProto:
        """The tensor itself, or where it now stands in the file `beside`."""
        if self.beside is None or len(tensor.raw_data) < SMALL:
            return tensor
        self.beside.touch()  # onnx would make a file that nobody else can read
        set_external_data(tensor, self.beside.name)
        save_external_data(tensor, str(self.beside.parent))
        tensor.ClearField("raw_data")
        place = TensorProto()
        place.CopyFrom(tensor)  # protobuf's arena keeps what is cleared as long as the message
        return place

    def _unique(self, name: str) -> str:
        found, count = name, 1
        while found in self._taken:
            count += 1
            found = f"{name}.{count}"
        self._taken.add(found)
        return found
