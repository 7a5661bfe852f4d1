"""The static graphs, without Qualcomm's provider: valid ONNX, the checkpoint's integers, the reference's function."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from afq_export.errors import InputError, VerdictError
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.operand import Operand
from afq_export.lower.qnn.decoder import mask_grid, write_graph
from afq_export.lower.qnn.grids import AGAIN, Stored, quantized
from afq_export.lower.qnn.linears import write_linear
from afq_export.lower.qnn.program import write_programs
from afq_export.lower.qnn.readback import read_graph, verify_graph
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.quantize.checkpoint import StaticRange
from afq_export.runtime.qnn_session import QnnSession
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.validate.evaluate import measure
from afq_export.validate.rungs import fake_quant_rung
from tests.models import opt_config
from tests.static_checkpoints import CONTEXT, PREFILL, htp_target, random_windows, static_checkpoint

SCHEMES = ["w8a16-static", "w4a16-static", "w4a16-static-g32", "w8a8-static"]


class CpuSession(QnnSession):
    """The graphs as ONNX's own meaning of quantize and dequantize has them: ONNX Runtime's CPU, nothing fused."""

    def _program(self, name: str):
        if name not in self._programs:
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            path, providers = str(self._folder / f"{name}.onnx"), ["CPUExecutionProvider"]
            self._programs[name] = onnxruntime.InferenceSession(path, options, providers=providers)
        return self._programs[name]


class Lowered:
    """One checkpoint and its graphs."""

    def __init__(self, folder: Path, scheme: str) -> None:
        self.model: FloatCheckpoint
        self.model, self.checkpoint = static_checkpoint(folder, f"{scheme}+rtn")
        self.target, self.folder = htp_target(), folder / "bundle"
        self.folder.mkdir()
        write_programs(self.checkpoint, self.target, self.folder, {"model": "random"}, silent)


@pytest.fixture(scope="module", params=SCHEMES)
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return Lowered(tmp_path_factory.mktemp(request.param), request.param)


def test_both_graphs_hold_the_checkpoint(lowered: Lowered) -> None:
    for name in ("prefill.onnx", "decode.onnx"):
        content = read_graph(lowered.folder / name)
        verify_graph(lowered.checkpoint, content, name)
        assert content.operators["RMSNormalization"] == 2 * 2 + 1, "one operator each, never taken apart"


def test_a_changed_code_or_grid_is_found(lowered: Lowered, tmp_path: Path) -> None:
    for planted in ("codes", "grid"):
        model = onnx.load(lowered.folder / "decode.onnx")
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        if planted == "codes":
            name = next(n for n in ("blocks.1.up_proj.codes", "blocks.1.up_proj.values") if n in tensors)
            array = numpy_helper.to_array(tensors[name]).copy()
            array[3, 5] = array[3, 5] + 1 if array[3, 5] < 3 else array[3, 5] - 1
        else:
            node = next(n for n in model.graph.node if n.name.startswith("blocks.1.up_proj.quantized"))
            name, array = node.input[1], numpy_helper.to_array(tensors[node.input[1]]) * np.float32(1.001)
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
        onnx.save(model, tmp_path / "decode.onnx")
        with pytest.raises(VerdictError, match="not the checkpoint"):
            verify_graph(lowered.checkpoint, read_graph(tmp_path / "decode.onnx"), "decode.onnx")


def test_no_float_enters_leaves_or_stays(lowered: Lowered) -> None:
    """Inputs and outputs are codes, and between two operators there is always a grid."""
    for name in ("prefill", "decode"):
        graph = onnx.load(lowered.folder / f"{name}.onnx").graph
        kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        assert kinds <= {TensorProto.UINT8, TensorProto.UINT16}
        producers = {value: node for node in graph.node for value in node.output}
        stored = {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                continue
            floats = [value for value in node.input if value not in stored]
            assert all(producers[value].op_type == "DequantizeLinear" for value in floats), node.name


def test_the_graphs_are_the_reference(lowered: Lowered) -> None:
    """Whole sequences through prefill, and token by token through decode: what torch computes from the same grids.

    Single steps differ where float32 sums in another order cross a border; 8-bit steps are coarse.
    """
    ids_NT = random_windows(2, CONTEXT).ids_NT
    session = CpuSession(lowered.folder, compiled=False)

    class Decoded:
        vocab, context, prefill = session.vocab, session.context, 1

        def logits(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.cat([session.extend(ids[at : at + 1], at) for at in range(len(ids))])

    rungs = {"fake": fake_quant_rung(lowered.checkpoint), "prefill": session, "decode": Decoded()}
    found = measure(rungs, ids_NT, [("fake", "prefill"), ("fake", "decode")])
    most = 2e-3 if lowered.checkpoint.tensors["hidden"].bits == 8 else 2e-5
    assert float(found.pairs["fake", "prefill"].kl.mean()) < most
    assert float(found.pairs["fake", "decode"].kl.mean()) < most


def test_past_and_order(lowered: Lowered) -> None:
    """A sequence in pieces is the same sequence; other sequences before it leave nothing behind."""
    session = CpuSession(lowered.folder, compiled=False)
    ids = random_windows(1, CONTEXT).ids_NT[0]
    whole = session.logits(ids)
    session.logits(ids.flip(0))
    parts = torch.cat([session.extend(ids[:5], 0), session.extend(ids[5:6], 5), session.extend(ids[6:], 6)])
    step = lowered.checkpoint.tensors["lm_head"].scale
    bits = lowered.checkpoint.tensors["hidden"].bits
    assert float((whole - parts).abs().max()) <= step * (4 if bits == 8 else 64)
    again = session.extend(ids[7:9], 7)
    assert float((again - parts[7:9]).abs().max()) <= step * (4 if bits == 8 else 64)
    with pytest.raises(InputError, match="not seen"):
        session.extend(ids[:1], CONTEXT - 1)
    with pytest.raises(InputError, match="longer than the program's context"):
        session.logits(torch.zeros(CONTEXT + 1, dtype=torch.long))


def test_generate_is_greedy_and_ends(lowered: Lowered) -> None:
    session = CpuSession(lowered.folder, compiled=False)
    ids = random_windows(1, 6).ids_NT[0]
    made = session.generate(ids, 100, frozenset())
    assert len(made) == CONTEXT - 6 + 1, "until the context is full"
    assert made[0] == int(session.logits(ids)[-1].argmax())
    assert session.generate(ids, 100, frozenset({made[2]})) == made[: made.index(made[2])]


def test_large_tensors_are_shared_by_both_graphs(lowered: Lowered) -> None:
    data = (lowered.folder / "prefill.onnx.data").stat().st_size
    places = []
    for name in ("prefill", "decode"):
        graph = onnx.load(lowered.folder / f"{name}.onnx", load_external_data=False).graph
        places.append({t.name: [e.value for e in t.external_data] for t in graph.initializer if t.external_data})
    assert places[0] == places[1] and places[0]
    assert all(int(offset) + int(length) <= data for _, offset, length in places[0].values())


def test_the_mask_has_codes_for_both_of_its_values(lowered: Lowered) -> None:
    grid = mask_grid(lowered.checkpoint)
    stored = Stored.of(grid)
    top = np.iinfo(stored.zero_point.dtype).max
    assert stored.values(np.array(top, stored.zero_point.dtype)) == 0
    for index in range(lowered.checkpoint.config.layers):
        scores = lowered.checkpoint.block_tensors(index)["scores"]
        high = (scores.qmax - scores.zero_point) * scores.scale
        low = (scores.qmin - scores.zero_point) * scores.scale
        assert high + stored.values(np.zeros((), stored.zero_point.dtype)) <= low + scores.scale


def test_a_tensor_without_a_grid_is_refused() -> None:
    graph = OnnxGraph()
    x = Operand.of(graph, "x", (1, 2, 4))
    y = x.unary("Sigmoid")
    grid = StaticRange(0.1, 0, 8)
    with pytest.raises(InputError, match="no grid"):
        quantized(graph, {"x": grid}, {}, 8)
    made, grids = quantized(graph, {"x": grid, y.value: StaticRange(2**-8, -128, 8)}, {y.value: "y"}, 8)
    assert [node.op_type for node in made.nodes] == [
        "DequantizeLinear", "Sigmoid", "QuantizeLinear", "DequantizeLinear",
    ]  # fmt: skip
    assert grids["y"] == StaticRange(2**-8, -128, 8)


def test_a_change_of_grid_is_written_where_there_is_one() -> None:
    graph, wide, narrow = OnnxGraph(), StaticRange(0.1, 5, 16), StaticRange(3.0, 0, 8)
    again = graph.node(AGAIN, ["x"])
    graph.node("Relu", [again], "y")
    for other, changes in ((narrow, 2), (wide, 0)):
        made, _ = quantized(graph, {"x": wide, again: other, "y": other}, {}, 16)
        assert [node.op_type for node in made.nodes].count("QuantizeLinear") == 1 + changes // 2
        assert AGAIN not in {node.op_type for node in made.nodes}


def test_biases_are_refused_before_any_work() -> None:
    with pytest.raises(InputError, match="takes no bias"):
        assign(opt_config(), load_recipe("w8a16-static", ()), load_target("android-qnn-htp"))


def test_a_linear_with_a_bias_is_refused(lowered: Lowered) -> None:
    linear = dataclasses.replace(lowered.checkpoint.linear("blocks.0.q_proj"), bias=torch.zeros(32))
    graph = OnnxGraph()
    with pytest.raises(InputError, match="takes no bias"):
        write_linear(graph, Operand.of(graph, "x", (1, 2, 32)), linear, lowered.target.kernels[0])


def test_shapes_are_static_and_as_documented(lowered: Lowered) -> None:
    config = lowered.checkpoint.config
    made = write_graph(lowered.checkpoint, lowered.target, PREFILL, CONTEXT, silent)
    assert made.inputs["hidden"] == (1, PREFILL, config.hidden)
    assert made.inputs["mask"] == (1, 1, PREFILL, CONTEXT)
    assert made.inputs["past.1.key"] == (1, config.kv_heads * config.head_dim, CONTEXT - PREFILL)
    assert made.outputs["present.0.value"] == (1, config.kv_heads, PREFILL * config.head_dim)
    assert made.outputs["logits"] == (1, PREFILL, config.vocab)
