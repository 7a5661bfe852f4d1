"""The finished file: valid, standard, tensors under the layers' names, and nothing of this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from afq_export.errors import InputError
from afq_export.lower.onnx.interface import DecoderExporterConfig, described, dummy_inputs, shapes
from afq_export.lower.onnx.linears import STORED, stored_scales
from afq_export.lower.onnx.program import MODEL, build, context_length, lower_onnx, opset_of, require_opset
from afq_export.progress import silent
from afq_export.quantize.assign import session_options
from afq_export.spec.target import Shapes
from tests.lower.onnx.decoders import CASES, CONTEXT, PROVENANCE, Decoders, Lowered, lowered, random_ids, small_target

TARGETS = ("linux-x64-ort", "linux-arm64-ort", "android-ort")
SMALL_CONSTANT = 64
"""Bytes of a constant that no layer owns: sizes, axes, single numbers."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, decoders: Decoders) -> Lowered:
    return decoders(request.param)


def test_the_checker_takes_the_file_and_every_operator_is_standard(case: Lowered) -> None:
    onnx.checker.check_model(case.path, full_check=True)
    model = onnx.load(case.path)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions and not model.graph.sparse_initializer


def test_opset_and_ir_version_are_the_targets_or_what_two_bits_need(case: Lowered) -> None:
    model = onnx.load(case.path)
    needed = max(case.target.kernel(record.kernel).opset for record in case.checkpoint.records.values())
    needed = 26 if case.checkpoint.kv_cache.quantized else needed  # BitCast
    assert model.opset_import[0].version == max(case.target.onnx.opset, needed) == case.content.opset
    assert model.ir_version == (13 if needed >= 25 else case.target.onnx.ir_version)


def test_nothing_of_this_machine_is_in_the_file(case: Lowered) -> None:
    model, data = onnx.load(case.path), case.path.read_bytes()
    for place in (Path.cwd(), case.path.parent, Path.home(), Path(onnx.__file__).parent):
        assert os.fsencode(place) not in data
    assert not model.doc_string and not model.graph.doc_string
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert not any(tensor.doc_string or tensor.metadata_props for tensor in model.graph.initializer)
    assert not any(tensor.HasField("data_location") for tensor in model.graph.initializer), "a trace of files"


def test_the_file_says_what_it_is_and_how_it_is_run(case: Lowered) -> None:
    facts = case.inside.get_modelmeta().custom_metadata_map
    assert json.loads(facts["session_options"]) == session_options(case.checkpoint.records, case.target)
    assert int(facts["context_length"]) == CONTEXT
    assert {key: facts[key] for key in PROVENANCE} == PROVENANCE
    assert facts == case.content.metadata


def test_every_tensor_is_named_after_its_layer(case: Lowered) -> None:
    model = onnx.load(case.path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert len(stored) == len(model.graph.initializer)
    for name, record in case.checkpoint.records.items():
        kernel, spec = case.target.kernel(record.kernel), record.spec
        codes = stored.pop(f"{name}.codes")
        assert tuple(codes.dims) == (spec.inputs, spec.outputs)
        assert codes.data_type == onnx.helper.np_dtype_to_tensor_dtype(np.dtype(STORED[kernel.stored_bits]))
        assert len(stored.pop(f"{name}.scales").raw_data) == stored_scales(case.checkpoint.linear(name), kernel).nbytes
        assert (stored.pop(f"{name}.bias", None) is not None) == spec.bias
        stored.pop(f"{name}.zero_points", None)
    nobodys = {
        name: len(t.raw_data) for name, t in stored.items() if not name.startswith(("blocks.", "head.", "embed"))
    }
    tables = {"rope.cos", "rope.sin"} if case.config.rope else set()
    tables |= {"hadamard"} if case.config.down_hadamard else set()
    assert {name for name, size in nobodys.items() if size > SMALL_CONSTANT} == tables
    assert all(node.name == node.output[0] for node in model.graph.node)


def test_inputs_and_outputs_are_those_of_the_interface(case: Lowered) -> None:
    """Names, order, types and dynamic axes: ours, optimum's and the loaded session's are one."""
    exporter, inside = DecoderExporterConfig.of(case.config), case.inside
    for values, ours, axes in zip(
        (inside.get_inputs(), inside.get_outputs()),
        shapes(case.config, case.checkpoint.kv_cache),
        (exporter.inputs, exporter.outputs),
        strict=True,
    ):
        assert [(value.name, tuple(value.shape)) for value in values] == list(ours.items())
        assert list(ours) == list(axes)
        for name, shape in ours.items():
            assert {axis: size for axis, size in enumerate(shape) if isinstance(size, str)} == axes[name]
        integers = {"input_ids", "attention_mask", "position_ids"}
        kinds = dict.fromkeys(integers, "int64") | {"logits": "float"}
        cached = "uint8" if case.checkpoint.kv_cache.quantized else "float"
        assert all(value.type == f"tensor({kinds.get(value.name, cached)})" for value in values)
    assert ("position_ids" in exporter.inputs) == (case.config.rope is not None)


def test_optimum_reads_the_sizes(case: Lowered) -> None:
    normalized, config = DecoderExporterConfig.normalized(described(case.config)), case.config
    assert (normalized.num_layers, normalized.num_attention_heads) == (config.layers, config.heads)
    assert (normalized.num_key_value_heads, normalized.head_dim) == (config.kv_heads, config.head_dim)
    assert (normalized.vocab_size, normalized.hidden_size) == (config.vocab, config.hidden)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(batch=st.integers(1, 3), sequence=st.integers(1, 5), past=st.integers(0, 4))
def test_it_runs_with_optimums_dummy_inputs(case: Lowered, batch: int, sequence: int, past: int) -> None:
    config = case.config
    given = dummy_inputs(config, batch, sequence, past, case.checkpoint.kv_cache)
    found = case.run(given)
    sizes = {"batch": batch, "sequence": sequence, "past": past, "total": past + sequence}
    for side, arrays in zip(shapes(config, case.checkpoint.kv_cache), (given, found), strict=True):
        assert {n: tuple(sizes.get(size, size) for size in shape) for n, shape in side.items()} == {
            name: array.shape for name, array in arrays.items()
        }
    assert all(np.isfinite(array).all() for array in found.values())
    for name in (name for name in given if name.startswith("past_key_values.")):
        present = found[name.replace("past_key_values", "present")]
        assert np.array_equal(present[:, :, :past], given[name]), "the cache is kept, not recomputed"


def test_the_same_checkpoint_gives_the_same_bytes(case: Lowered, tmp_path: Path) -> None:
    lower_onnx(case.checkpoint, case.target, tmp_path, PROVENANCE, silent)
    assert (tmp_path / MODEL).read_bytes() == case.path.read_bytes()


def test_progress_ends_at_its_total(decoders: Decoders, tmp_path: Path) -> None:
    case, steps = decoders("qwen3"), []
    lower_onnx(case.checkpoint, case.target, tmp_path, {}, lambda label, done, total: steps.append((done, total)))
    assert steps[-1] == (4, 4)
    assert steps == sorted(steps)


def test_large_models_keep_their_tensors_beside_the_file(decoders: Decoders, tmp_path: Path) -> None:
    whole, ids = decoders("qwen2"), random_ids(96, 20)
    config, scheme, changes = CASES["qwen2"]
    apart = lowered(tmp_path, config, scheme, small_target(external_data_mb=0), changes)
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_mode == apart.path.stat().st_mode, "as readable as the program"
    assert data.stat().st_size + apart.path.stat().st_size >= whole.path.stat().st_size
    large = [t for t in onnx.load(apart.path, load_external_data=False).graph.initializer if t.external_data]
    assert {t.name for t in large} > {"lm_head.codes", "rope.cos"}
    assert {entry.value for t in large for entry in t.external_data if entry.key == "location"} == {data.name}
    assert apart.content.linears.keys() == whole.content.linears.keys()
    assert torch.equal(apart.session().logits(ids), whole.session().logits(ids))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (apart.path, data):
        path.rename(moved / path.name)
    onnx.checker.check_model(moved / "model.onnx", full_check=True)


@pytest.mark.parametrize("name", TARGETS)
def test_targets_differ_in_zero_points_only(decoders: Decoders, name: str, tmp_path: Path) -> None:
    """On ARM blocks have weight zero points of 0 written out; the logits are those without them, bit for bit."""
    config, scheme, changes = CASES["qwen2, groups"]
    one, other = decoders("qwen2, groups"), lowered(tmp_path, config, scheme, small_target(name), changes)
    model = onnx.load(other.path)
    written = {t.name: t.data_type for t in model.graph.initializer if t.name.endswith(".zero_points")}
    blocked = {f"{n}.zero_points" for n, record in other.checkpoint.records.items() if record.spec.weight.group}
    assert {n for n, kind in written.items() if kind == TensorProto.INT4} == (
        blocked if other.target.onnx.explicit_zero_points else set()
    )
    ids = random_ids(96, 20)
    assert torch.equal(other.session().logits(ids), one.session().logits(ids))


def test_context_is_the_smaller_of_both(decoders: Decoders) -> None:
    case = decoders("opt, tied")
    long = msgspec.structs.replace(case.target, shapes=Shapes(context=4096, prefill=16))
    assert context_length(case.checkpoint, case.target) == CONTEXT
    assert context_length(case.checkpoint, long) == case.config.max_positions
    rope = decoders("qwen3")
    assert not [name for name in case.content.tensors if name.startswith("rope")]
    tensors = {t.name: tuple(t.dims) for t in build(rope.checkpoint, long, {}, silent).graph.initializer}
    assert tensors["rope.cos"] == tensors["rope.sin"] == (rope.config.max_positions, rope.config.head_dim // 2)


def test_opset_is_raised_only_for_kernels_that_need_it(decoders: Decoders) -> None:
    assert opset_of(decoders("llama, 2 bits").checkpoint, small_target()) == 25
    assert opset_of(decoders("llama, 3 bits").checkpoint, small_target()) == 23
    assert opset_of(decoders("llama, 3 bits").checkpoint, small_target(opset=24)) == 24


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opset": 22}, r"opset does not fit \[target linux-x64-ort: onnx\.opset = 22\]: 23 is the first"),
        ({"opset": 28}, r"onnx\.opset = 28.*26 the last"),
        ({"ir_version": 10}, r"IR version does not fit .*= 10\]: opset 23 needs 11"),
        ({"ir_version": 14}, r"ONNX Runtime takes 13 at most"),
    ],
)
def test_what_the_runtime_does_not_load_is_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        require_opset(small_target(**options))


@pytest.mark.parametrize(("opset", "ir_version"), [(23, 11), (24, 11), (25, 13), (26, 13)])
def test_what_is_not_refused_loads(decoders: Decoders, opset: int, ir_version: int, tmp_path: Path) -> None:
    target, case = small_target(opset=opset, ir_version=ir_version), decoders("qwen3")
    require_opset(target)
    config, scheme, changes = CASES["qwen3"]
    made = lowered(tmp_path, config, scheme, target, changes)
    assert onnx.load(made.path).opset_import[0].version == opset
    ids = random_ids(config.vocab, 12)
    assert torch.equal(made.session().logits(ids), case.session().logits(ids))
