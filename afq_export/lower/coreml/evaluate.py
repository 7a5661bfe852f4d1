"""What a package computes, by the meaning of its operations: nothing on this machine runs Core ML.

Every operation is computed in float32 and its result rounded to the type that the program gives it, after Apple's
description of the operations (coremltools, "MIL Ops"). A device adds in another order and may keep more bits in
between: this is a reading of the file, not a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.errors import InputError
from afq_export.lower.coreml.readback import DEQUANTIZE, Content, Operation

_CASTS = {"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32}
Given = dict[str, Any]


class PackageReader:
    """`logits` of sequences by a package's own operations and states, in calls of `prefill` tokens as on a device."""

    def __init__(self, content: Content) -> None:
        self.content, self.prefill = content, content.prefill
        shape = next(iter(content.states.values()))
        self.context = shape[2]
        self._constants = {name: _tensor(value) for name, value in content.constants.items()}
        for operation in content.operations:
            if operation.kind == DEQUANTIZE:
                self._constants[operation.outputs[0]] = _dequantize(self._given(operation, self._constants))
        self._states: dict[str, Tensor] = {}

    def logits(self, ids_T: Tensor) -> Tensor:
        """Float32 [T, V] of a sequence that starts at position 0."""
        self._states = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in self.content.states.items()}
        calls, position = [], 0
        for part in ids_T.split(self.prefill):
            calls.append(self._call(part, position))
            position += len(part)
        return torch.cat(calls)

    def _call(self, ids_T: Tensor, position: int) -> Tensor:
        values = dict(self._constants)
        values["tokens"] = ids_T[None].int()
        values["input_pos"] = torch.tensor([position], dtype=torch.int32)
        for operation in self.content.operations:
            match operation.kind:
                case "read_state":
                    values[operation.outputs[0]] = self._states[operation.inputs["input"][0]].clone()
                case "write_state":
                    given = self._given(operation, values, "data")
                    self._states[operation.inputs["input"][0]] = given["data"]
                case kind if kind != DEQUANTIZE:
                    values[operation.outputs[0]] = _run(operation, self._given(operation, values))
        return values[self.content.outputs[0]][0]

    def _given(self, operation: Operation, values: dict[str, Tensor], *only: str) -> Given:
        def one(value: str | np.ndarray) -> Any:
            return values[value] if isinstance(value, str) else _tensor(value)

        taken = {name: [one(v) for v in given] for name, given in operation.inputs.items() if not only or name in only}
        return {name: given if name == "values" else given[0] for name, given in taken.items()}


def _run(operation: Operation, given: Given) -> Tensor:
    if operation.kind not in OPERATIONS:
        raise InputError("an operation without a meaning here", where=operation.outputs[0], why=operation.kind)
    return OPERATIONS[operation.kind](given)


def _dequantize(given: Given) -> Tensor:
    """Scale times code, in the type of the scale."""
    scale, data = given["scale"], given["data"].float()
    return (scale.float().repeat_interleave(data.shape[1] // scale.shape[1], dim=1) * data).to(scale.dtype)


def _float(function: Callable[..., Tensor], *names: str) -> Callable[[Given], Tensor]:
    """`function` of the named inputs in float32, rounded to the type of the first; integers as they are."""

    def run(given: Given) -> Tensor:
        tensors = [given[name] for name in names if given.get(name) is not None]
        if not tensors[0].is_floating_point():
            return function(*tensors)
        return function(*(tensor.float() for tensor in tensors)).to(tensors[0].dtype)

    return run


def _slices(given: Given) -> tuple[slice, ...]:
    x = given["x"]
    begin, end = given["begin"].tolist(), given["end"].tolist()
    whole = [False] * x.ndim
    from_start, to_end = (_list(given.get(name), whole) for name in ("begin_mask", "end_mask"))
    return tuple(
        slice(None if from_start[axis] else begin[axis], None if to_end[axis] else end[axis]) for axis in range(x.ndim)
    )


def _slice_update(given: Given) -> Tensor:
    changed = given["x"].clone()
    changed[_slices(given)] = given["update"]
    return changed


def _slice_by_index(given: Given) -> Tensor:
    part = given["x"][_slices(given)]
    dropped = [axis for axis, drop in enumerate(_list(given.get("squeeze_mask"), [])) if drop]
    return part.squeeze(tuple(dropped)) if dropped else part


def _layer_norm(given: Given) -> Tensor:
    x = given["x"]
    return F.layer_norm(x.float(), x.shape[-1:], given["gamma"], given["beta"], float(given["epsilon"])).to(x.dtype)


def _attention(given: Given) -> Tensor:
    tensors = (given[name].float() for name in ("query", "key", "value", "attn_mask"))
    return F.scaled_dot_product_attention(*tensors).to(given["query"].dtype)


def _gelu(given: Given) -> Tensor:
    exact = str(given["mode"]) == "EXACT"
    return _float(lambda x: F.gelu(x, approximate="none" if exact else "tanh"), "x")(given)


def _expand(given: Given) -> Tensor:
    x = given["x"]
    for axis in sorted(given["axes"].tolist()):
        x = x.unsqueeze(axis)
    return x


def _squeeze(given: Given) -> Tensor:
    return given["x"].squeeze(tuple(given["axes"].tolist())) if "axes" in given else given["x"].squeeze()


OPERATIONS: dict[str, Callable[[Given], Tensor]] = {
    "add": _float(torch.add, "x", "y"),
    "mul": _float(torch.mul, "x", "y"),
    "silu": _float(F.silu, "x"),
    "relu": _float(F.relu, "x"),
    "gelu": _gelu,
    "linear": _float(F.linear, "x", "weight", "bias"),
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
    "rsqrt": lambda given: torch.rsqrt(given["x"] + given["epsilon"]),
    "reduce_mean": lambda given: given["x"].mean(given["axes"].tolist(), keepdim=bool(given["keep_dims"])),
    "cast": lambda given: given["x"].to(_CASTS[str(given["dtype"])]),
    "greater": lambda given: given["x"] > given["y"],
    "greater_equal": lambda given: given["x"] >= given["y"],
    "select": lambda given: torch.where(given["cond"], given["a"], given["b"]),
    "gather": lambda given: F.embedding(given["indices"], given["x"]),
    "shape": lambda given: torch.tensor(given["x"].shape, dtype=torch.int32),
    "range_1d": lambda given: torch.arange(*(int(given[k]) for k in ("start", "end", "step")), dtype=torch.int32),
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "reshape": lambda given: given["x"].reshape(given["shape"].tolist()),
    "transpose": lambda given: given["x"].permute(given["perm"].tolist()),
    "tile": lambda given: given["x"].repeat(given["reps"].tolist()),
    "concat": lambda given: torch.cat(given["values"], dim=int(given["axis"])),
    "slice_by_index": _slice_by_index,
    "slice_update": _slice_update,
}
"""What the program is made of; an operation that is not here stops the reading."""


def _tensor(value: np.ndarray) -> Any:
    if value.dtype.kind in "US":
        return value.reshape(-1)[0]
    if value.dtype.name == "int4":
        value = value.astype(np.int8)
    return torch.from_numpy(np.array(value))


def _list(mask: Tensor | None, otherwise: Sequence[bool]) -> list[bool]:
    return list(otherwise) if mask is None else mask.tolist()
