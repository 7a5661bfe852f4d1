"""Qualcomm programs in the x86 simulator: nothing outside of the HTP, compiled contexts, one decoder of two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from afq_export.errors import InputError, MissingToolError
from afq_export.lower.qnn.program import lower_qnn, write_step_vectors
from afq_export.progress import silent
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.runtime import qnn as runtime
from afq_export.runtime.qnn import HostFile, open_model, read_host_file, require_qnn
from afq_export.runtime.qnn_session import QnnSession
from afq_export.validate.evaluate import measure
from afq_export.validate.htp import htp_rung
from tests.static_checkpoints import CONTEXT, PREFILL, htp_target, random_windows, static_checkpoint

OPTIONS = HostFile(context=CONTEXT, htp_arch=75, soc_model=57, provider={}, steps={})


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Path]:
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra [qnn]")
    folder = tmp_path_factory.mktemp("qnn")
    checkpoint = static_checkpoint(folder, "w8a16-static+rtn")[1]
    (folder / "bundle").mkdir()
    lower_qnn(checkpoint, htp_target(), folder / "bundle", {}, silent)
    return checkpoint, folder / "bundle"


def test_contexts_are_for_the_target_and_hold_all(lowered: tuple[QuantizedCheckpoint, Path]) -> None:
    _, folder = lowered
    assert read_host_file(folder).htp_arch == 75
    for name in ("prefill", "decode"):
        nodes = onnx.load(folder / f"{name}_ctx.onnx").graph.node
        assert [node.op_type for node in nodes] == ["EPContext"], (
            "one partition: no operator is left to another provider"
        )
        assert (folder / f"{name}_ctx_qnn.bin").stat().st_size > 10_000


def test_compiled_programs_equal_the_graphs(lowered: tuple[QuantizedCheckpoint, Path]) -> None:
    """Code for code, prefill and the decode that follows it."""
    _, folder = lowered
    ids = random_windows(1, PREFILL + 1).ids_NT[0]
    compiled, graph = (QnnSession(folder, compiled=which) for which in (True, False))
    for taken, position in ((ids[:PREFILL], 0), (ids[PREFILL:], PREFILL)):
        assert torch.equal(compiled.extend(taken, position), graph.extend(taken, position))


def test_prefill_and_decode_are_the_reference(lowered: tuple[QuantizedCheckpoint, Path]) -> None:
    checkpoint, folder = lowered
    session = QnnSession(folder)

    class Decoded:
        vocab, context, prefill = session.vocab, session.context, 1

        def logits(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.cat([session.extend(ids[at : at + 1], at) for at in range(len(ids))])

    rungs = {"reference": htp_rung(checkpoint, htp_target()), "prefill": session, "decode": Decoded()}
    found = measure(rungs, random_windows(2, CONTEXT).ids_NT, [("reference", "prefill"), ("reference", "decode")])
    for name in ("prefill", "decode"):
        assert float(found.pairs["reference", name].kl.mean()) < 1e-4, name


def test_vectors_are_what_the_programs_compute(lowered: tuple[QuantizedCheckpoint, Path]) -> None:
    _, folder = lowered
    write_step_vectors(folder, random_windows(1, 6).ids_NT[0])
    tensors = load_file(folder / "vectors.safetensors")
    session = QnnSession(folder)
    for name in ("prefill", "decode"):
        given, expected = (
            {key.removeprefix(start): array for key, array in tensors.items() if key.startswith(start)}
            for start in (f"{name}.input.", f"{name}.output.")
        )
        found = session.run(name, given)
        assert all(np.array_equal(found[key], array) for key, array in expected.items()) and expected


def test_what_the_htp_does_not_take_is_refused_not_run_on_the_cpu(tmp_path: Path) -> None:
    """NonZero has no form there: with fallback allowed ONNX Runtime would run it on the CPU without a word."""
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra [qnn]")
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 4)),
        helper.make_tensor_value_info("y", TensorProto.INT64, None),
    ]
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"])], "float", values[:1], values[1:])
    path = tmp_path / "nonzero.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"the HTP does not take the program.*fallback to CPU EP has been explicitly"):
        open_model(path, OPTIONS)


def test_without_the_provider_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = runtime.importlib.util.find_spec
    monkeypatch.setattr(
        runtime.importlib.util, "find_spec", lambda name: None if name == "onnxruntime_qnn" else found(name)
    )
    with pytest.raises(MissingToolError, match=r"afq-export\[qnn\]"):
        require_qnn()


def test_a_broken_description_or_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no description of the programs"):
        QnnSession(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(InputError, match="the description does not fit"):
        QnnSession(tmp_path)
    runtime.write_host_file(tmp_path, OPTIONS)
    assert read_host_file(tmp_path) == OPTIONS
    with pytest.raises(InputError, match="cannot read the host's tables"):
        QnnSession(tmp_path)
