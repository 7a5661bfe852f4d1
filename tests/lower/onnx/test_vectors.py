"""Test vectors: what is written is read back, runs, and is what ONNX's own tools expect."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from afq_export.errors import InputError
from afq_export.lower.onnx.vectors import DATA_SET, read_vectors, write_vectors

VALUES = {"ids": [[1, 2, 3]], "shift": [0.5, -1.0, 2.0, 0.0], "past": [[0.25, 0.5, 0.75, 1.0]]}
TYPES = {"ids": np.int64, "shift": np.float32, "past": np.float32}
KINDS = (np.float32, np.int64, np.int32, np.int8, np.uint8, np.bool_, np.float16, ml_dtypes.bfloat16, ml_dtypes.int4)


def vectors() -> dict[str, np.ndarray]:
    return {name: np.array(values, TYPES[name]) for name, values in VALUES.items()}


def small_model(folder: Path, *, old: bool = False) -> None:
    """rows = table[ids] + shift, longer = past ++ rows; `old`: the table is listed among the inputs too."""
    table = numpy_helper.from_array(np.arange(20, dtype=np.float32).reshape(5, 4), "table")
    inputs = [
        helper.make_tensor_value_info("past", TensorProto.FLOAT, ["n", 4]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("shift", TensorProto.FLOAT, [4]),
    ]
    if old:
        inputs.insert(0, helper.make_tensor_value_info("table", TensorProto.FLOAT, [5, 4]))
    outputs = [
        helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", "tokens", 4]),
        helper.make_tensor_value_info("longer", TensorProto.FLOAT, ["m", 4]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["found"]),
        helper.make_node("Add", ["found", "shift"], ["rows"]),
        helper.make_node("Squeeze", ["rows", "first"], ["flat"]),
        helper.make_node("Concat", ["past", "flat"], ["longer"], axis=0),
    ]
    first = numpy_helper.from_array(np.array([0]), "first")
    graph = helper.make_graph(nodes, "small", inputs, outputs, [table, first])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "model.onnx")


def computed(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def written(folder: Path, **options: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    small_model(folder, **options)
    inputs = vectors()
    outputs = computed(folder, inputs)
    assert write_vectors(folder, inputs, dict(reversed(outputs.items()))) == folder / DATA_SET
    return inputs, outputs


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name


@pytest.mark.parametrize("old", [False, True])
def test_what_was_written_is_read_and_runs(tmp_path: Path, old: bool) -> None:
    given_inputs, given_outputs = written(tmp_path, old=old)
    inputs, outputs = read_vectors(tmp_path)
    assert_same(inputs, given_inputs)
    assert_same(outputs, given_outputs)
    assert_same(computed(tmp_path, inputs), outputs)


def test_files_stand_in_the_order_of_the_graph(tmp_path: Path) -> None:
    """Whatever order the arrays came in; initializers that are listed as inputs have no file."""
    written(tmp_path, old=True)
    folder = tmp_path / DATA_SET
    names = {path.name: TensorProto.FromString(path.read_bytes()).name for path in folder.iterdir()}
    assert names == {
        "input_0.pb": "past",
        "input_1.pb": "ids",
        "input_2.pb": "shift",
        "output_0.pb": "rows",
        "output_1.pb": "longer",
    }


def test_onnx_reads_the_case_by_itself(tmp_path: Path) -> None:
    """The reference evaluator on the files, by position only, as ONNX's backend test runner does it."""
    _, outputs = written(tmp_path)
    reference = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    files = sorted((tmp_path / DATA_SET).glob("input_*.pb"))
    arrays = [numpy_helper.to_array(onnx.load_tensor(path)) for path in files]
    found = reference.run(None, dict(zip(reference.input_names, arrays, strict=True)))
    assert all(np.array_equal(a, b) for a, b in zip(found, outputs.values(), strict=True))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**32 - 1))
def test_every_type_and_shape_comes_back(tmp_path_factory: pytest.TempPathFactory, kind, shape, seed) -> None:
    folder = tmp_path_factory.mktemp("case")
    array = np.random.default_rng(seed).integers(-8, 8, shape).astype(kind)
    declared = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(array.dtype), [None] * len(shape))
    result = helper.make_tensor_value_info("y", declared.type.tensor_type.elem_type, [None] * len(shape))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [declared], [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), folder / "model.onnx")
    write_vectors(folder, {"x": array}, {"y": array})
    inputs, outputs = read_vectors(folder)
    assert_same(inputs, {"x": array})
    assert_same(outputs, {"y": array})


def test_a_cache_without_tokens_keeps_its_shape(tmp_path: Path) -> None:
    small_model(tmp_path)
    inputs = vectors() | {"past": np.zeros((0, 4), np.float32)}
    write_vectors(tmp_path, inputs, computed(tmp_path, inputs))
    assert read_vectors(tmp_path)[0]["past"].shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ids": None}, "missing: ids; not in the graph: none"),
        ({"table": np.zeros((5, 4), np.float32)}, "missing: none; not in the graph: table"),
        ({"ids": np.array([[1]], np.int32)}, r"ids.*int32 with 2 axes, the graph has INT64 with 2 axes"),
        ({"shift": np.zeros((1, 4), np.float32)}, r"shift.*2 axes, the graph has FLOAT with 1 axes"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path: Path, change: dict, match: str) -> None:
    small_model(tmp_path)
    inputs = {name: array for name, array in (vectors() | change).items() if array is not None}
    with pytest.raises(InputError, match=match):
        write_vectors(tmp_path, inputs, computed(tmp_path, vectors()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


def test_a_folder_without_whole_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model"):
        write_vectors(tmp_path, {}, {})
    (tmp_path / "model.onnx").write_bytes(b"\x01nothing")
    with pytest.raises(InputError, match="not an ONNX model"):
        write_vectors(tmp_path, {}, {})
    with pytest.raises(InputError, match=r"not whole.*input files none"):
        read_vectors(tmp_path)
    written(tmp_path)
    (tmp_path / DATA_SET / "input_1.pb").write_bytes(b"\x01nothing")
    with pytest.raises(InputError, match=r"not a tensor.*input_1"):
        read_vectors(tmp_path)
    (tmp_path / DATA_SET / "input_1.pb").unlink()
    with pytest.raises(InputError, match=r"not whole.*\[0, 2\]"):
        read_vectors(tmp_path)
