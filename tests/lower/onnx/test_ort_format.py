"""model.ort computes what model.onnx computes, and is what a phone's build can load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from afq_export.errors import InputError, VerdictError
from afq_export.lower.onnx import ort_format
from afq_export.lower.onnx.ort_bytes import canonical
from afq_export.lower.onnx.ort_format import ORT_CONFIG, ORT_MODEL, OrtFiles, write_ort_format
from afq_export.lower.onnx.vectors import read_vectors
from afq_export.runtime.onnxruntime import read_options, session_options

INPUTS, OUTPUTS, BLOCK = 96, 40, 32
LEVEL = "session.qdq_matmulnbits_accuracy_level"
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((1, 7, INPUTS)).astype(np.float32)


def save(folder: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray | onnx.TensorProto]) -> Path:
    """model.onnx with one float input x [batch, sequence, INPUTS] and one float output y."""
    tensors = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", OUTPUTS])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def weights_int8() -> dict[str, np.ndarray]:
    return {
        "w": RANDOM.integers(-128, 128, (INPUTS, OUTPUTS)).astype(np.int8),
        "w_scale": RANDOM.uniform(0.001, 0.01, OUTPUTS).astype(np.float32),
    }


def static(folder: Path, codes: type = np.int8) -> Path:
    """W8A8 with stored ranges: quantize and dequantize around a MatMul, the result float."""
    zero = np.array(-7 if codes is np.int8 else 121, codes)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    return save(folder, nodes, weights_int8() | {"s": np.array(0.03, np.float32), "z": zero})


def dynamic(folder: Path) -> Path:
    """W8A8 with ranges found at run time."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "s", "z"]),
        helper.make_node("MatMulInteger", ["xq", "w", "z"], ["acc"]),
        helper.make_node("Cast", ["acc"], ["sum"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "w_scale"], ["scale"]),
        helper.make_node("Mul", ["sum", "scale"], ["y"]),
    ]
    return save(folder, nodes, weights_int8())


def blockwise(folder: Path) -> Path:
    """Int4 weights in blocks along the inputs."""
    codes = RANDOM.integers(-8, 8, (INPUTS, OUTPUTS))
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wd"], axis=0, block_size=BLOCK),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    scales = RANDOM.uniform(0.01, 0.1, (INPUTS // BLOCK, OUTPUTS)).astype(np.float32)
    packed = helper.make_tensor("w", TensorProto.INT4, codes.shape, codes.flatten().tolist())
    return save(folder, nodes, {"w": packed, "w_scale": scales})


CASES = {
    "static-s8": (static, {}, "MatMulIntegerToFloat"),
    "static-u8": (lambda folder: static(folder, np.uint8), {}, "MatMulIntegerToFloat"),
    "dynamic": (dynamic, {}, "DynamicQuantizeMatMul"),
    "int4-level4": (blockwise, {LEVEL: "4"}, "MatMulNBits"),
    "int4-level0": (blockwise, {LEVEL: "0"}, "MatMulNBits"),
}


def run(path: Path, session: dict[str, str] | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in (session or {}).items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


Made = tuple[Path, OrtFiles]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """model.onnx and what was written from it, by case."""
    found = {}
    for case, (build, session, _) in CASES.items():
        folder = tmp_path_factory.mktemp(case)
        model = build(folder)
        found[case] = model, write_ort_format(model, folder / "out", session)
    return found


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_bit_for_bit(made: dict[str, Made], case: str) -> None:
    (model, files), (_, session, kernel) = made[case], CASES[case]
    assert np.array_equal(run(files.model), run(model, session))
    assert ("com.microsoft", kernel) in files.operators
    assert sorted(path.name for path in files.model.parent.iterdir()) == sorted((ORT_CONFIG, ORT_MODEL))


def test_the_accuracy_level_is_baked_in(made: dict[str, Made], tmp_path: Path) -> None:
    """Two levels give two files; session options of who loads them change neither."""
    model, at_0 = made["int4-level0"]
    at_4 = write_ort_format(model, tmp_path, {LEVEL: "4"})
    by_level = {"0": run(at_0.model, {LEVEL: "4"}), "4": run(at_4.model, {LEVEL: "0"})}
    assert all(np.array_equal(result, run(model, {LEVEL: level})) for level, result in by_level.items())
    assert not np.array_equal(by_level["0"], by_level["4"])


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_the_same_every_time_and_name_no_path(made: dict[str, Made], tmp_path: Path, case: str) -> None:
    model, first = made[case]
    second = write_ort_format(model, tmp_path / "another name", CASES[case][1])
    for one, two in ((first.model, second.model), (first.config, second.config)):
        assert one.read_bytes() == two.read_bytes()
        assert not any(part.encode() in one.read_bytes() for part in (str(model.parent), str(tmp_path)))
    assert first.config.read_text().startswith("# What model.ort needs")


def test_as_it_comes_from_the_runtime_the_file_is_not_the_same_every_time(tmp_path: Path) -> None:
    """The reason for `canonical`: the same length and the same meaning, and yet other bytes in front of the model."""
    model = static(tmp_path)
    raw = set()
    for number in range(8):
        options = ort_format._options({})
        options.optimized_model_filepath = str(tmp_path / f"{number}.ort")
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        raw.add((tmp_path / f"{number}.ort").read_bytes())
    assert len({canonical(data) for data in raw}) == 1
    once = canonical(raw.pop())
    assert canonical(once) == once
    with pytest.raises(ValueError, match="not a file in ONNX Runtime's format"):
        canonical(model.read_bytes())


def test_the_remedy_for_x86_is_not_in_a_file_for_arm(made: dict[str, Made], tmp_path: Path) -> None:
    """Signed activations and weights stay signed whatever the session says; so do the bytes."""
    model, plain = made["static-s8"]
    remedied = write_ort_format(model, tmp_path, {"session.x64quantprecision": "1"})
    assert plain.model.read_bytes() == remedied.model.read_bytes()
    types = plain.config.read_text().split("MatMulIntegerToFloat")[1]
    assert "uint8_t" not in types, "the activations would be unsigned"


def test_all_is_cut_to_extended_and_basic_keeps_the_qdq_graph(made: dict[str, Made], tmp_path: Path) -> None:
    model, extended = made["static-s8"]
    by_level = {
        level: write_ort_format(model, tmp_path / level, {"graph_optimization_level": level})
        for level in ("all", "basic")
    }
    assert by_level["all"].model.read_bytes() == extended.model.read_bytes()
    assert ("ai.onnx", "DequantizeLinear") in by_level["basic"].operators
    assert not any(domain.startswith("com.microsoft.nchwc") for domain, _ in by_level["all"].operators)


@pytest.mark.parametrize("recipe", ["w4a8-g32", "w8a8-static", "w8a8-dynamic"])
def test_a_whole_decoder_in_its_bundle(lowered: Callable, recipe: str) -> None:
    """Both files of a bundle give the stored outputs for the stored inputs, and carry the same provenance."""
    bundle = lowered("demo-llama", recipe, "android-ort")
    options = read_options(bundle.folder / "session_options.json")
    inputs, outputs = read_vectors(bundle.folder)
    sessions = [
        ort.InferenceSession(str(path), session_options(options.session), providers=["CPUExecutionProvider"])
        for path in (bundle.model, bundle.folder / ORT_MODEL)
    ]
    for session in sessions:
        found = session.run(list(outputs), inputs)
        assert all(np.array_equal(a, b) for a, b in zip(found, outputs.values(), strict=True))
    facts = [session.get_modelmeta().custom_metadata_map for session in sessions]
    assert facts[0] == facts[1] and facts[0]


def test_operators_are_read_off_a_line_with_types() -> None:
    line = (
        'ai.onnx;21;Cast{"inputs": {"0": ["float"]}, "outputs": {"0": ["int8_t"]}},MatMul,Mul{"inputs": {"0": ["f"]}}'
    )
    assert ort_format._operators(line) == [("ai.onnx", "Cast"), ("ai.onnx", "MatMul"), ("ai.onnx", "Mul")]


def refused(kind: type[Exception], match: str, model: Path, out: Path, session: dict[str, str] | None = None) -> None:
    with pytest.raises(kind, match=match):
        write_ort_format(model, out, session or {})
    assert not out.exists() or list(out.iterdir()) == [], "nothing half-written"


def test_what_cannot_be_converted_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = dynamic(tmp_path), tmp_path / "out"
    refused(InputError, "no model", tmp_path / "other.onnx", out)
    refused(InputError, "unknown optimisation level", model, out, {"graph_optimization_level": "layout"})
    monkeypatch.setattr(ort_format, "LARGEST", 1000)
    refused(InputError, "too large for ONNX Runtime's format", model, out)
    monkeypatch.undo()
    monkeypatch.setattr(ort_format, "FOREIGN", ("com.microsoft",))
    refused(VerdictError, r"bound to this machine.*DynamicQuantizeMatMul", model, out)
    model.write_bytes(model.read_bytes()[:-100])
    refused(InputError, "cannot convert the model", model, out)


def test_a_type_that_the_format_has_not_is_refused(tmp_path: Path) -> None:
    """Int4 that no kernel took stays int4 in the graph, and the format has no int4."""
    codes = RANDOM.integers(-8, 8, (INPUTS, OUTPUTS))
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wd"], axis=1),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    scales = np.full(OUTPUTS, 0.1, np.float32)
    packed = helper.make_tensor("w", TensorProto.INT4, codes.shape, codes.flatten().tolist())
    model = save(tmp_path, nodes, {"w": packed, "w_scale": scales})
    session = {"graph_optimization_level": "basic"}
    with pytest.raises((InputError, VerdictError)):
        write_ort_format(model, tmp_path / "out", session)
    assert list((tmp_path / "out").iterdir()) == []
