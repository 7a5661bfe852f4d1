"""Single linears through the runtime by the program's own nodes, against the integer models; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from afq_export.errors import InputError
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.linears import write_linear
from afq_export.lower.onnx.operand import Operand, activate
from afq_export.lower.onnx.probe import run_linears
from afq_export.quantize.assign import session_options
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.runtime.onnxruntime import RunOptions
from afq_export.spec.catalog import load_target
from afq_export.validate.integer.linear import integer_linear
from tests.lower.onnx.decoders import CASES, Decoders, Lowered

TARGETS = ("linux-x64-ort", "linux-arm64-ort", "android-ort")


def probed(case: Lowered, tokens: int) -> tuple[list[QuantizedLinear], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A block's linears and the head, their inputs and what the runtime gives."""
    linears = [*case.checkpoint.block(0).values(), case.checkpoint.linear("lm_head")]
    random = np.random.default_rng(tokens)
    inputs = {a.spec.name: random.standard_normal((tokens, a.spec.inputs), np.float32) for a in linears}
    return linears, inputs, run_linears(linears, inputs, case.target, case.options)


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("name", CASES)
def test_kernels_give_what_the_integer_models_say(decoders: Decoders, name: str, tokens: int) -> None:
    case = decoders(name)
    linears, inputs, results = probed(case, tokens)
    for linear in linears:
        kernel = case.target.kernel(linear.record.kernel)
        expected = integer_linear(kernel.arithmetic, linear, torch.from_numpy(inputs[linear.spec.name])).numpy()
        found = results[linear.spec.name]
        assert found.shape == (tokens, linear.spec.outputs)
        if kernel.max_relative_error:
            assert np.abs(found - expected).max() <= kernel.max_relative_error * np.abs(expected).max(), linear.spec
        else:
            assert np.array_equal(found, expected), linear.spec


@pytest.mark.parametrize("name", TARGETS)
def test_explicit_zero_points_change_no_bit(decoders: Decoders, name: str) -> None:
    case = decoders("qwen2, groups")
    target = load_target(name)
    linears, inputs, results = probed(case, 9)
    options = RunOptions(session_options(case.checkpoint.records, target))
    for linear, found in run_linears(linears, inputs, target, options).items():
        assert np.array_equal(found, results[linear])


def test_an_input_must_be_there_and_fit(decoders: Decoders) -> None:
    case = decoders("qwen3")
    linear = case.checkpoint.linear("lm_head")
    with pytest.raises(InputError, match=r"no input for a linear \[lm_head\]"):
        run_linears([linear], {}, case.target, case.options)
    for shape in ((2, 63), (0, 64), (64,), (1, 2, 64)):
        with pytest.raises(InputError, match="does not fit its linear"):
            run_linears([linear], {"lm_head": np.zeros(shape, np.float32)}, case.target, case.options)


def test_kernels_of_another_runtime_are_refused(decoders: Decoders) -> None:
    linear = decoders("qwen3").checkpoint.linear("lm_head")
    for kernel in load_target("android-xnnpack").kernels:
        with pytest.raises(InputError, match=r"ONNX Runtime has no such kernel \[lm_head\]"):
            write_linear(OnnxGraph(), "x", linear, kernel)


def test_a_static_linear_needs_its_range(decoders: Decoders) -> None:
    linear = decoders("qwen3").checkpoint.linear("blocks.0.q_proj")
    with pytest.raises(InputError, match=r"needs the range of its input \[blocks\.0\.q_proj\]"):
        write_linear(OnnxGraph(), "x", linear, load_target("linux-x64-ort").kernel("MatMulIntegerToFloat"))


# The graph and its stand-ins for tensors


def test_names_are_unique_and_equal_constants_one() -> None:
    graph = OnnxGraph("part")
    assert [graph.node("Relu", ["x"]) for _ in range(3)] == ["part.relu", "part.relu.2", "part.relu.3"]
    assert graph.integers(1, 2) == graph.integers(1, 2) != graph.integers(2, 1)
    assert graph.scalar(1) != graph.integers(1), "a number is no list of one"
    one, negative = (graph.constant(np.array(value, np.float32)) for value in (0.0, -0.0))
    assert one != negative, "by their bits"
    large = np.zeros(400, np.float32)
    assert graph.constant(large) != graph.constant(large), "looking up large ones would keep them in memory twice"
    assert len(graph.initializers) == 8


def test_trailing_inputs_that_are_left_out_are_not_written() -> None:
    graph = OnnxGraph()
    graph.node("Attention", ["q", "", "v", "", ""])
    assert list(graph.nodes[0].input) == ["q", "", "v"]


def test_what_is_written_once_is_written_once() -> None:
    graph = OnnxGraph()
    values = {graph.once(("relu", "x"), lambda: graph.node("Relu", ["x"])) for _ in range(3)}
    assert values == {"model.relu"} and len(graph.nodes) == 1


def test_a_view_costs_no_node_until_it_is_needed() -> None:
    graph = OnnxGraph()
    x = Operand.of(graph, "x", ("batch", "sequence", 12))
    heads = x.view("batch", "sequence", 3, 4)
    assert heads.view("batch", "sequence", 12).as_stored(x.shape) == "x" and not graph.nodes
    assert heads.as_stored(heads.shape) != "x"
    assert [node.op_type for node in graph.nodes] == ["Reshape"]
    with pytest.raises(InputError, match="a view of another size"):
        x.view("batch", "sequence", 5, 4)
    with pytest.raises(InputError, match="a view of another size"):
        x.view("sequence", "batch", 12)


def test_unknown_nonlinearities_are_refused() -> None:
    with pytest.raises(InputError, match="no ONNX form of the nonlinearity"):
        activate("swish", Operand.of(OnnxGraph(), "x", ("batch", 4)))


def test_a_file_for_the_probe_is_never_written(decoders: Decoders, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    probed(decoders("qwen3"), 2)
    assert not list(tmp_path.iterdir())
