"""Test vectors beside model.onnx, as ONNX's own backend tests lay them out.

test_data_set_0/input_0.pb, input_1.pb, ...    TensorProto of each graph input, in the graph's order
test_data_set_0/output_0.pb, ...               the same for what the runtime computed from them

The order is what ties a file to an input; the tensor's name, which these files also carry, is a second witness of it.
Source: onnx/backend/test/runner of the ONNX project, which looks for model.onnx and test_data_set_* in one folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from afq_export.errors import InputError
from afq_export.files import folder_beside

DATA_SET = "test_data_set_0"
"""The folder's name, in the bundle."""
MODEL = "model.onnx"
FILE = re.compile(r"(input|output)_([0-9]+)\.pb")


def write_vectors(folder: Path, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Path:
    """Writes one data set for `folder`/model.onnx, whole or not at all, and returns its folder.

    `inputs` and `outputs` are by name, in any order; files are in the order of the graph. Raises InputError unless the
    names are the graph's and every array has the type and the number of axes that the graph declares.
    """
    graph = _graph(folder)
    initialized = {tensor.name for tensor in graph.initializer}
    sides = {
        "input": ([value for value in graph.input if value.name not in initialized], inputs),
        "output": (list(graph.output), outputs),
    }
    for side, (values, arrays) in sides.items():
        _check(side, values, arrays, folder)
    with folder_beside(folder / DATA_SET) as part:
        for side, (values, arrays) in sides.items():
            for index, value in enumerate(values):
                tensor = numpy_helper.from_array(np.asarray(arrays[value.name], order="C"), value.name)
                (part / f"{side}_{index}.pb").write_bytes(tensor.SerializeToString(deterministic=True))
    return folder / DATA_SET


def read_vectors(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The inputs and outputs of the data set in `folder`, by name and in the graph's order.

    Raises InputError when there is none, a number is missing in the row, or a file is no tensor.
    """
    data_set = folder / DATA_SET
    found: dict[str, dict[int, Path]] = {"input": {}, "output": {}}
    for path in data_set.glob("*.pb"):
        if match := FILE.fullmatch(path.name):
            found[match[1]][int(match[2])] = path
    for side, files in found.items():
        if not files or sorted(files) != list(range(len(files))):
            raise InputError(
                "test vectors are not whole",
                where=str(data_set),
                why=f"{side} files {sorted(files) or 'none'}",
                do="export it again",
            )
    inputs, outputs = (
        dict(_tensor(files[index]) for index in sorted(files)) for files in (found["input"], found["output"])
    )
    return inputs, outputs


def _graph(folder: Path) -> onnx.GraphProto:
    """The graph without its weights when they are in a file of their own."""
    path = folder / MODEL
    try:
        return onnx.load_model(path, load_external_data=False).graph
    except OSError as error:
        raise InputError("no model", where=str(path), why=error.strerror or str(error)) from error
    except Exception as error:  # protobuf's DecodeError is of a module that is not ours to import
        raise InputError("not an ONNX model", where=str(path), why=str(error).split("\n")[0]) from error


def _check(side: str, values: list[onnx.ValueInfoProto], arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    names = [value.name for value in values]
    if set(names) != set(arrays):
        strange, missing = sorted(set(arrays) - set(names)), sorted(set(names) - set(arrays))
        raise InputError(
            f"test vectors do not fit the graph's {side}s",
            where=str(folder / MODEL),
            why=f"missing: {', '.join(missing) or 'none'}; not in the graph: {', '.join(strange) or 'none'}",
        )
    for value in values:
        kind, array = value.type.tensor_type, arrays[value.name]
        given = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        axes = len(kind.shape.dim) if kind.HasField("shape") else array.ndim
        if given != kind.elem_type or array.ndim != axes:
            declared = f"{TensorProto.DataType.Name(kind.elem_type)} with {axes} axes"
            raise InputError(
                f"test vector does not fit the graph's {side}",
                where=value.name,
                why=f"{array.dtype} with {array.ndim} axes, the graph has {declared}",
            )


def _tensor(path: Path) -> tuple[str, np.ndarray]:
    try:
        tensor = TensorProto.FromString(path.read_bytes())
        return tensor.name, numpy_helper.to_array(tensor)
    except OSError as error:
        raise InputError("cannot read a test vector", where=str(path), why=error.strerror or str(error)) from error
    except Exception as error:  # protobuf and numpy raise many types on damaged bytes
        raise InputError("not a tensor", where=str(path), why=str(error).split("\n")[0]) from error
