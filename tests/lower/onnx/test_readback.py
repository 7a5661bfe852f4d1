"""Reading a file back: what is found is the checkpoint, and whatever was changed in the file is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper

from afq_export.errors import InputError, VerdictError
from afq_export.lower.onnx.coverage import REASONS, coverage_of
from afq_export.lower.onnx.linears import stored_scales
from afq_export.lower.onnx.program import verify
from afq_export.lower.onnx.readback import read_model, read_onnx
from tests.checkpoints import INPUT, OUTPUT
from tests.lower.onnx.decoders import CASES, Decoders, Lowered

DYNAMIC, STATIC, REQUANTIZED, BLOCKS = "qwen3", "qwen2", "llama, requantized", "qwen2, groups"
A4, ROWS4 = "llama, 4-bit inputs", "llama, rows of 4 bits"
WEIGHT_ONLY, ALL4, OPT, ROWS32 = "llama, weights only", "mistral, all in 4 bits, tied", "opt, static", "opt, float rows"


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, decoders: Decoders) -> Lowered:
    return decoders(request.param)


def test_integers_read_back_are_the_checkpoints(case: Lowered) -> None:
    content = read_onnx(case.path)
    assert list(content.linears) == list(case.checkpoint.records)
    for name, found in content.linears.items():
        ours = case.checkpoint.linear(name)
        assert np.array_equal(found.codes, ours.codes.numpy()), name
        assert np.array_equal(found.scales, stored_scales(ours, case.target.kernel(ours.record.kernel))), name
        assert found.codes.dtype == np.int8
        assert (found.bias is None) == (ours.bias is None)
        assert ours.bias is None or np.array_equal(found.bias, ours.bias.numpy())
    verify(case.checkpoint, case.target, content)


def test_grids_read_back(decoders: Decoders) -> None:
    static, requantized = (read_onnx(decoders(name).path).linears for name in (STATIC, REQUANTIZED))
    for name in ("blocks.0.q_proj", "blocks.1.down_proj"):
        assert static[name].output is None
        assert (static[name].input.zero_point, requantized[name].input.zero_point) == (INPUT.zero_point,) * 2
        assert np.float32(static[name].input.scale) == np.float32(INPUT.scale)
        assert np.float32(requantized[name].output.scale) == np.float32(OUTPUT.scale)
        assert requantized[name].output.zero_point == OUTPUT.zero_point
    assert static["lm_head"].input is None


def test_linears_with_one_input_share_its_codes(case: Lowered) -> None:
    """q, k and v, and gate and up: quantized once."""
    operators, records = case.content.operators, case.checkpoint.records
    inputs = {"llama": 4, "opt": 4}[case.config.family] * case.config.layers
    kernels = [record.kernel for record in records.values()]
    tokens = sum(kernel.startswith("MatMulInteger") and kernel != "MatMulIntegerToFloat" for kernel in kernels)
    assert operators.get("MatMulInteger", 0) == tokens
    if tokens == len(kernels):
        cached = 2 * case.config.layers if case.checkpoint.kv_cache.quantized else 0
        assert operators["ReduceMax"] == inputs + 1 + cached, (
            "the head's, and keys' and values' where the cache has codes"
        )
    if kernels[0] == "MatMulIntegerToFloat":
        assert operators["QuantizeLinear"] == inputs


def test_coverage_names_every_linear_and_every_reason(case: Lowered) -> None:
    coverage = coverage_of(case.checkpoint, case.content)
    assert [(line.name, line.kernel) for line in coverage.lowered] == [
        (name, record.kernel) for name, record in case.checkpoint.records.items()
    ]
    counts = {line.what: line.count for line in coverage.refused}
    assert counts["Attention"] == case.config.layers
    norms = 2 * case.config.layers * (2 if case.config.qk_norm else 1) + 1
    assert counts["RMSNormalization" if case.config.rope else "LayerNormalization"] == norms
    assert counts.get("RotaryEmbedding", 0) == (2 * case.config.layers if case.config.rope else 0)
    assert counts.keys() <= REASONS.keys() and all(line.reason for line in coverage.refused)


def test_heads_lie_side_by_side_without_reshapes(decoders: Decoders) -> None:
    """Rotary embedding and attention take them so; norms per head are what needs the shape."""
    assert "Reshape" not in decoders("llama, heads of 8").content.operators
    assert "Transpose" not in decoders("llama, heads of 8").content.operators
    assert decoders(DYNAMIC).content.operators["Reshape"] == 4 * decoders(DYNAMIC).config.layers


# Faults


def changed(name: str, place: int = 5) -> Callable[[ModelProto], None]:
    """Turns over one bit of a stored tensor: one code, or the last bits of one number."""

    def change(model: ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        data = bytearray(tensor.raw_data)
        data[place % len(data) // 4 * 4] ^= 1
        tensor.raw_data = bytes(data)

    return change


def node_of(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


FAULTS: dict[str, tuple[str, Callable[[ModelProto], None], str, str]] = {
    "a code, int8": (DYNAMIC, changed("blocks.1.o_proj.codes"), "blocks.1.o_proj", "codes differ"),
    "a code, int4": (BLOCKS, changed("blocks.0.up_proj.codes"), "blocks.0.up_proj", "codes differ"),
    "a code, int2": ("llama, 2 bits", changed("blocks.1.k_proj.codes"), "blocks.1.k_proj", "codes differ"),
    "a code of the head": (STATIC, changed("lm_head.codes"), "lm_head", "codes differ"),
    "a scale per row": (DYNAMIC, changed("blocks.0.gate_proj.scales"), "blocks.0.gate_proj", "scales differ"),
    "a scale of a row in blocks": (ROWS4, changed("blocks.0.down_proj.scales"), "blocks.0.down_proj", "scales differ"),
    "a scale of a group": (WEIGHT_ONLY, changed("blocks.0.v_proj.scales"), "blocks.0.v_proj", "scales differ"),
    "a bias": (OPT, changed("blocks.1.fc1.bias"), "blocks.1.fc1", "bias differs"),
    "a bias behind blocks": (BLOCKS, changed("blocks.0.k_proj.bias"), "blocks.0.k_proj", "bias differs"),
    "a norm": (DYNAMIC, changed("blocks.1.mlp_norm.weight"), "blocks.1.mlp_norm.weight", "not there"),
    "a norm of a head": (DYNAMIC, changed("blocks.0.q_norm.weight"), "blocks.0.q_norm.weight", "not there"),
    "a norm's bias": (OPT, changed("head.final_norm.bias"), "head.final_norm.bias", "not there"),
    "a token row": (DYNAMIC, changed("embed_tokens.codes"), "embed_tokens.codes", "not there"),
    "a float token row": (ROWS32, changed("embed_tokens.weight"), "embed_tokens.weight", "not there"),
    "a row's scale": (DYNAMIC, changed("embed_tokens.scales"), "embed_tokens.scales", "not there"),
    "a shared table": (ALL4, changed("lm_head.codes"), "lm_head", "codes differ"),
    "a position": (OPT, changed("embed_positions.weight"), "embed_positions.weight", "not there"),
    "the Hadamard matrix": ("llama, Hadamard matrices", changed("hadamard"), "hadamard", "not there"),
    "a cosine": (DYNAMIC, changed("rope.cos"), "rope.cos", "not there"),
    "a sine": (DYNAMIC, changed("rope.sin"), "rope.sin", "not there"),
    "the grid of an input": (STATIC, changed("scale", 0), "blocks.0.q_proj", "input grid differs"),
    "a zero point of an input": (STATIC, changed("zero_point", 0), "blocks.0.q_proj", "input grid differs"),
    "a zero point of an output": (REQUANTIZED, changed("zero_point.2", 0), "blocks.0.q_proj", "output grid differs"),
    "the scale of an output": (REQUANTIZED, changed("scale.2", 0), "blocks.0.q_proj", "output grid differs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_number_that_was_changed_is_named(decoders: Decoders, fault: str) -> None:
    name, change, where, why = FAULTS[fault]
    case = decoders(name)
    model = onnx.load(case.path)
    change(model)
    with pytest.raises(VerdictError, match=rf"the file is not the checkpoint \[{re.escape(where)}\]: .*{why}"):
        verify(case.checkpoint, case.target, read_model(model))


def plant(model: ModelProto, array: np.ndarray) -> str:
    """Adds a tensor."""
    model.graph.initializer.append(numpy_helper.from_array(array, "planted"))
    return "planted"


def rewire(node: str, index: int, value: str | np.ndarray) -> Callable[[ModelProto], None]:
    """Gives a node another input: a value of the graph, or a tensor of its own."""

    def change(model: ModelProto) -> None:
        name = value if isinstance(value, str) else plant(model, value)
        found = node_of(model, node)
        found.input.extend([""] * (index + 1 - len(found.input)))
        found.input[index] = name

    return change


def without(node: str, replacement: int = 0) -> Callable[[ModelProto], None]:
    """Takes a node out; what used its result uses one of its inputs."""

    def change(model: ModelProto) -> None:
        gone = node_of(model, node)
        for other in model.graph.node:
            for place, name in enumerate(other.input):
                if name == gone.output[0]:
                    other.input[place] = gone.input[replacement]
        model.graph.node.remove(gone)

    return change


def attribute(node: str, name: str, value: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        next(a for a in node_of(model, node).attribute if a.name == name).i = value

    return change


def number(name: str, value: float) -> Callable[[ModelProto], None]:
    """Another value for a constant."""

    def change(model: ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        old = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.full_like(old, value), name))

    return change


def float_weight(node: str) -> Callable[[ModelProto], None]:
    """A MatMul with the float values of its weight: the same function, and no integer kernel."""

    def change(model: ModelProto) -> None:
        weight = node_of(model, f"{node}.weight")
        codes, scales = (
            numpy_helper.to_array(tensor).astype(np.float32)
            for name in weight.input[:2]
            for tensor in model.graph.initializer
            if tensor.name == name
        )
        rewire(node, 1, codes * scales)(model)

    return change


def another_linear(model: ModelProto) -> None:
    """A copy of a linear at the end of the graph, under a name of its own."""
    copy = helper.make_node("MatMul", list(node_of(model, "blocks.0.q_proj").input), ["more"], name="blocks.0.more")
    model.graph.node.append(copy)


Q = "blocks.0.q_proj"
TOKENS = "blocks.0.rmsnormalization"
GRID = f"{TOKENS}.input"
STRUCTURE: dict[str, tuple[str, Callable[[ModelProto], None], str]] = {
    "a float MatMul": (STATIC, float_weight(Q), rf"a float MatMul \[{Q}\]: its weight is not quantized"),
    "one more linear": (STATIC, another_linear, r"linears of its own \[blocks\.0\.more\]"),
    "a linear is missing": (STATIC, without("blocks.0.k_proj"), r"\[blocks\.0\.k_proj\]: it is not there"),
    "an integer linear is missing": (DYNAMIC, without("blocks.1.v_proj"), r"\[blocks\.1\.v_proj\]: it is not there"),
    "another linear's weight": (STATIC, rewire(Q, 1, "blocks.0.o_proj.weight"), rf"\[{Q}\]: codes differ"),
    "no bias": (STATIC, without(f"{Q}.biased"), rf"\[{Q}\]: bias is missing"),
    "a weight's zero points": (STATIC, rewire(f"{Q}.weight", 2, np.ones(64, np.int8)), rf"zero points \[{Q}\]"),
    "zero points of blocks": (
        WEIGHT_ONLY,
        rewire(f"{Q}.weight", 2, np.ones((2, 64), np.int8)),
        rf"weights with zero points \[{Q}\]",
    ),
    "another group": (WEIGHT_ONLY, attribute(f"{Q}.weight", "block_size", 16), "in blocks of 16 instead of .* 32"),
    "scales along the inputs": (STATIC, attribute(f"{Q}.weight", "axis", 0), rf"along the other axis \[{Q}\]"),
    "a computed scale": (STATIC, rewire(f"{Q}.weight", 1, "past.length"), r"computed, not stored \[past\.length\]"),
    "no input grid": (STATIC, rewire(Q, 0, TOKENS), rf"\[{Q}\]: input grid differs"),
    "two input grids": (STATIC, rewire(f"{GRID}.codes", 1, np.float32(1)), rf"on another \[{GRID}\]"),
    "two input grids, the other half": (STATIC, rewire(GRID, 2, np.uint8(1)), rf"on another \[{GRID}\]"),
    "two output grids": (REQUANTIZED, rewire(f"{Q}.output", 1, np.float32(1)), r"on another"),
    "no output grid": (REQUANTIZED, without(f"{Q}.output.codes"), rf"\[{Q}\]: output grid differs"),
    "zero points of tokens": (DYNAMIC, rewire(Q, 2, np.uint8(127)), rf"other zero points \[{Q}\]"),
    "a weight zero point of tokens": (DYNAMIC, rewire(Q, 3, np.int8(1)), rf"other zero points \[{Q}\]"),
    "fewer codes of tokens": (DYNAMIC, number("qmax", 63), rf"on another grid \[{Q}\]: .*63"),
    "4-bit codes of tokens": (DYNAMIC, number("qmax", 7), rf"\[{Q}\]: kernel MatMulInteger on int4 inputs instead"),
    "8-bit codes of tokens": (A4, number("qmax", 127), rf"\[{Q}\]: kernel MatMulInteger instead of .* int4 inputs"),
    "another middle": (DYNAMIC, number("middle", 127), rf"on another grid \[{Q}\]"),
    "another least range": (DYNAMIC, number("least", 1), rf"on another grid \[{Q}\]"),
    "steps of something else": (DYNAMIC, rewire(f"{TOKENS}.abs", 0, "embed_tokens"), rf"on another grid \[{Q}\]"),
    "codes that are not rounded": (DYNAMIC, without(f"{TOKENS}.rounded"), r"does not come from Round"),
    "sums without their steps": (DYNAMIC, without(f"{Q}.steps"), rf"without scales \[{Q}\]"),
    "sums without their scales": (DYNAMIC, without(f"{Q}.scaled"), rf"without scales \[{Q}\]"),
    "another token's steps": (DYNAMIC, rewire(f"{Q}.steps", 1, "embed_tokens"), rf"without scales \[{Q}\]"),
}


@pytest.mark.parametrize("fault", STRUCTURE)
def test_another_graph_is_refused(decoders: Decoders, fault: str) -> None:
    name, change, said = STRUCTURE[fault]
    case = decoders(name)
    model = onnx.load(case.path)
    change(model)
    with pytest.raises((VerdictError, InputError), match=said):
        verify(case.checkpoint, case.target, read_model(model))


@pytest.mark.parametrize("data", [b"", b"no program", bytes(4096), b"\xee" * 5000])
def test_other_bytes_are_no_model(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_onnx(path)
    with pytest.raises(InputError):
        read_onnx(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_truncated_model_is_refused(decoders: Decoders, keep: float, tmp_path: Path) -> None:
    path, data = tmp_path / "model.onnx", decoders(STATIC).path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(InputError, match="cannot read the ONNX file"):
        read_onnx(path)
