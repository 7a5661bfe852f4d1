"""Our delegates against what ExecuTorch's own partitioner and preprocess write for the same linear."""

from __future__ import annotations

import json
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import executorch.backends.xnnpack.serialization
import executorch.data.bin
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.lowered_backend_module import get_lowered_submodules

from afq_export.errors import InputError
from afq_export.lower.executorch.graph import Payload, Tokens, XnnGraph
from afq_export.lower.executorch.operand import Operand, activate
from afq_export.lower.executorch.segments import probe_segment
from tests.checkpoints import KERNELS, random_linear
from tests.validate.xnnpack_programs import Linears

TOKENS = 16


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.filterwarnings("ignore")
def test_same_delegate_as_executorchs_own_lowering(kernel: str, bias: bool, tmp_path: Path) -> None:
    linear = random_linear(kernel, 48, 64, bias=bias)
    ours = probe_segment({"q": linear}, {"q": (Tokens(TOKENS), 64)}).payload
    theirs = official(linear)
    assert decode(ours.program, tmp_path) == decode(theirs.program, tmp_path)
    assert constants(ours) == constants(theirs)


def official(linear: Any) -> Payload:
    """The delegate of a quantize-dequantize linear, lowered as ExecuTorch's documentation says."""
    count = torch.export.Dim("tokens", min=1, max=TOKENS)
    module, example = Linears([linear]).eval(), (torch.randn(4, linear.spec.inputs),)
    with torch.no_grad():
        exported = torch.export.export(module, example, dynamic_shapes={"inputs": ({0: count},)}, strict=False)
        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()], compile_config=config)
    ((_, lowered, _),) = get_lowered_submodules(edge.exported_program().graph_module)
    return Payload(lowered.processed_bytes, lowered.named_data_store_output)


def decode(program: bytes, folder: Path) -> dict[str, Any]:
    """A delegate as plain data, without the debug handles, values numbered in the order in which nodes name them."""
    header = XNNHeader.from_bytes(program[: XNNHeader.EXPECTED_LENGTH])
    binary = folder / "graph.bin"
    binary.write_bytes(program[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
    schema = folder / "schema.fbs"
    schema.write_bytes(resources.files(executorch.backends.xnnpack.serialization).joinpath("schema.fbs").read_bytes())
    flatc = resources.files(executorch.data.bin).joinpath("flatc")
    command = [str(flatc), "--json", "--strict-json", "--defaults-json", "--raw-binary", "-o", str(folder)]
    subprocess.run([*command, str(schema), "--", str(binary)], check=True)
    graph = json.loads((folder / "graph.json").read_text())
    return canonical(graph)


def canonical(graph: dict[str, Any]) -> dict[str, Any]:
    """Values replaced by their content, so that two graphs are equal when they compute the same."""
    keys = [constant["named_key"] for constant in graph["constant_data"]]

    def value(index: int) -> Any:
        if index >= len(graph["xvalues"]):
            return None
        union = dict(graph["xvalues"][index]["xvalue_union"])
        tensor = dict(union.pop("tensor_value", union))
        grid = dict(union.get("quant_params", {}))
        if "scale_buffer_idx" in grid:
            grid["scale_buffer_idx"] = keys[grid["scale_buffer_idx"]]
        tensor["constant_buffer_idx"] = keys[tensor["constant_buffer_idx"]]
        tensor.pop("id_out")
        return tensor, grid

    nodes = [
        {key: value(field) if key.endswith("_id") else field for key, field in node["xnode_union"].items()}
        | {"kind": node["xnode_union_type"]}
        for node in graph["xnodes"]
    ]
    return {"nodes": nodes, "externs": graph["num_externs"]}


def constants(payload: Payload) -> dict[str, bytes]:
    return {key: bytes(payload.data.buffers[entry.buffer_index]) for key, entry in payload.data.pte_data.items()}


def test_shapes_follow_torch() -> None:
    graph = XnnGraph()
    tokens = Tokens(8)
    x = Operand(graph, graph.input((1, tokens, 4, 6)))
    table = Operand(graph, graph.input((tokens, 6)))
    assert (x * table[:, None, :]).shape == (1, 8, 4, 6)
    assert isinstance((x * table[:, None, :]).shape[1], Tokens)
    assert x[..., :3].shape == (1, 8, 4, 3)
    assert torch.cat((-x[..., 3:], x[..., :3]), dim=-1).shape == x.shape
    assert x.mean_last().shape == (1, 8, 4, 1)
    assert x.reshape(*x.shape[:2], 24).shape == (1, 8, 24)


def test_what_has_no_node_is_an_error() -> None:
    graph = XnnGraph()
    x = Operand(graph, graph.input((1, Tokens(8), 6)))
    with pytest.raises(InputError, match="index"):
        x[0]
    with pytest.raises(InputError, match="nonlinearity"):
        activate("mish", x)
    with pytest.raises(TypeError):
        torch.stack((x, x))


def test_linears_share_the_quantization_of_their_input() -> None:
    graph = XnnGraph()
    x = graph.input((Tokens(8), 6))
    assert graph.quantize_per_token(x) == graph.quantize_per_token(x)
    assert graph.quantize_static(x, 0.1, 3) == graph.quantize_static(x, 0.1, 3)
    assert graph.quantize_static(x, 0.1, 3) != graph.quantize_static(x, 0.1, 4)
