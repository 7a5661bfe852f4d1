"""Token rows: the same numbers as the checkpoint's, looked up before they are dequantized, stored once where tied."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from afq_export.lower.onnx.decoder import BATCH, SEQUENCE
from afq_export.lower.onnx.embedding import is_shared, write_rows
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.linears import write_linear
from afq_export.lower.onnx.operand import Operand
from afq_export.lower.onnx.parts import Part, part_model
from afq_export.lower.onnx.program import lower_onnx
from afq_export.progress import silent
from afq_export.quantize.assign import HEAD
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.runtime.onnxruntime import RunOptions
from afq_export.spec.target import TargetProfile
from afq_export.validate.onnxruntime import executed_kernels
from tests.lower.onnx.decoders import Lowered, decoder_config, lowered, random_ids, small_target

APART: dict[str, tuple[str, tuple[str, ...]]] = {
    "int8 in groups of 16": ("w8a8-dynamic", ("embedding.group=16",)),
    "int4": ("w8a8-dynamic", ("embedding.bits=4",)),
    "int2": ("w8a8-dynamic", ("embedding.bits=2",)),
    "int2 in groups of 16": ("w8a8-dynamic", ("embedding.bits=2", "embedding.group=16")),
    "int4 in groups, a head per row": ("w4a8-g32", ("embedding.bits=4", "embedding.group=32")),
    "int4, a head of 4 bits per row": ("w4a8", ("embedding.bits=4", "head.bits=4")),
    "float": ("w4a16-g32", ("embedding.bits=32",)),
}
SHARED: dict[str, tuple[str, tuple[str, ...]]] = {
    "int8 per row": ("w8a8-dynamic", ()),
    "int4 in groups": ("w4a8-g32-all4", ()),
    "int4 in groups, weights only": ("w4a16-g32", ("embedding.bits=4", "embedding.group=32", "head.bits=4")),
    "int8 in groups": ("w4a8-g32", ("embedding.group=32", "head.group=32")),
}
"""Scheme and changes; in SHARED the head has the embedding's grid, and tied weights give it the same integers."""


def made(
    folder: Path, scheme: str, changes: tuple[str, ...], tied: bool, target: TargetProfile | None = None
) -> Lowered:
    """A small Llama."""
    return lowered(folder, decoder_config(tied=tied, layers=1), scheme, target, changes)


def rows_model(checkpoint: QuantizedCheckpoint, target: TargetProfile) -> bytes:
    """Only the look-up, and the head that it may share its tensors with: `rows` and `logits` of `input_ids`."""
    graph, head = OnnxGraph("embedding"), checkpoint.linear(HEAD)
    rows = write_rows(graph, checkpoint, target, Operand.of(graph, "input_ids", (BATCH, SEQUENCE)))
    kernel = target.kernel(head.record.kernel)
    y = write_linear(graph, rows.value, head, kernel, target.onnx.explicit_zero_points)
    graph.node("Identity", [rows.value], "rows")
    graph.node("Identity", [y], "logits")
    sizes = {"rows": (BATCH, SEQUENCE, checkpoint.config.hidden), "logits": (BATCH, SEQUENCE, checkpoint.config.vocab)}
    return part_model(graph, {"input_ids": (BATCH, SEQUENCE)}, sizes, 23, integers=("input_ids",))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", APART | SHARED)
def test_rows_are_the_checkpoints_bit_for_bit(case: str, tied: bool, tmp_path: Path) -> None:
    """Every row, in the runtime and in onnx's own evaluator, in one sequence and in a batch."""
    file = made(tmp_path, *(APART | SHARED)[case], tied)
    embedding = file.checkpoint.embedding()
    assert is_shared(embedding, file.checkpoint.linear(HEAD), stored_bits(file)) == (tied and case in SHARED)
    if embedding.bits < 8:
        middle = 1 << embedding.bits - 1
        assert set(embedding.codes.flatten().tolist()) == set(range(-middle, middle))
    ids = torch.randperm(file.config.vocab, generator=torch.Generator().manual_seed(0)).view(2, -1).numpy()
    model, expected = rows_model(file.checkpoint, file.target), embedding.dequantized().numpy()[ids]
    for arrays in (Part(model, file.options)(input_ids=ids), ReferenceEvaluator(model).run(None, {"input_ids": ids})):
        assert np.array_equal(arrays[0], expected)


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("name", ["linux-x64-ort", "linux-arm64-ort", "android-ort"])
def test_tied_tables_are_stored_once(case: str, name: str, tmp_path: Path) -> None:
    """The file is smaller by the table, the head keeps its integer kernel, and no table is dequantized in a step."""
    target = small_target(name)
    one, two = (made(tmp_path / str(tied), *SHARED[case], tied, target) for tied in (True, False))
    table = {f"embed_tokens.{kind}" for kind in ("codes", "scales")}
    assert table <= tensors(two).keys() and not table & tensors(one).keys()
    saved = sum(tensors(two)[entry] for entry in table)
    assert 0.9 * saved < two.path.stat().st_size - one.path.stat().st_size < 1.1 * saved + 512
    for file in (one, two):
        ran = executed_kernels(file.path, file.options, random_ids(file.config.vocab, 4))
        assert ran[HEAD] == target.kernel(file.checkpoint.records[HEAD].kernel).runs_as != "MatMul"
        assert "DequantizeLinear" not in ran.values()
        whole = {"embed_tokens.bytes", "embed_tokens.scale_rows"}
        assert not whole & ran.keys(), "done once, when the file is loaded"


def test_int4_rows_take_half_a_byte_a_number(tmp_path: Path) -> None:
    """In the file: two codes in each byte, the first in its low bits."""
    file = made(tmp_path, *APART["int4"], False)
    codes, stored = file.checkpoint.embedding().codes.numpy(), file.content.tensors["embed_tokens.codes"]
    assert stored.dtype == np.uint8 and stored.shape == (codes.shape[0], codes.shape[1] // 2)
    assert np.array_equal((stored & 15).astype(np.int8), codes[:, ::2] & 15)
    assert np.array_equal((stored >> 4).astype(np.int8), codes[:, 1::2] & 15)


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_one_other_number_and_nothing_is_shared(case: str, part: str, tmp_path: Path) -> None:
    """Both tables are in the file then, and each gives its own numbers."""
    file = made(tmp_path, *SHARED[case], True)

    class Changed(QuantizedCheckpoint):
        """The checkpoint with one number of its head changed."""

        def linear(self, name: str) -> QuantizedLinear:
            linear = super().linear(name)
            if name != HEAD:
                return linear
            tensor = getattr(linear, part).clone()
            tensor[5, 0] = 0 if tensor[5, 0] else 1
            return dataclasses.replace(linear, **{part: tensor})

    fields = dataclasses.fields(QuantizedCheckpoint)
    other = Changed(**{field.name: getattr(file.checkpoint, field.name) for field in fields})
    assert not is_shared(other.embedding(), other.linear(HEAD), stored_bits(file))
    content = lower_onnx(other, file.target, tmp_path, {}, silent)
    assert "embed_tokens.codes" in content.tensors
    ids = np.arange(file.config.vocab)[None]
    [rows, _] = Part(rows_model(other, file.target), file.options)(input_ids=ids)
    assert np.array_equal(rows[0], file.checkpoint.embedding().dequantized().numpy())


def test_other_groups_are_never_shared(tmp_path: Path) -> None:
    """Nor are float rows."""
    file = made(tmp_path, "w8a8-dynamic", ("embedding.bits=32",), True)
    assert not is_shared(file.checkpoint.embedding(), file.checkpoint.linear(HEAD), 8)
    grouped = made(tmp_path / "grouped", "w4a8-g32-all4", ("embedding.group=16",), True)
    assert not is_shared(grouped.checkpoint.embedding(), grouped.checkpoint.linear(HEAD), 4)
    per_row = made(tmp_path / "row", *SHARED["int8 per row"], True)
    embedding, head = per_row.checkpoint.embedding(), per_row.checkpoint.linear(HEAD)
    assert is_shared(embedding, head, 8) and not is_shared(embedding, head, 4)


@pytest.mark.parametrize("case", SHARED)
def test_a_head_that_is_looked_up_computes_the_same(case: str, tmp_path: Path) -> None:
    """To the last bit: a second reader of its tensors does not change the kernel."""
    file = made(tmp_path, *SHARED[case], True)
    ids = np.arange(file.config.vocab)[None]
    rows, logits = Part(rows_model(file.checkpoint, file.target), file.options)(input_ids=ids)
    [alone] = Part(head_model(file.checkpoint.linear(HEAD), file.target), file.options)(x=rows)
    assert np.array_equal(logits, alone)


def head_model(head: QuantizedLinear, target: TargetProfile) -> bytes:
    """The head without the embedding beside it."""
    graph = OnnxGraph("head")
    y = write_linear(graph, "x", head, target.kernel(head.record.kernel), target.onnx.explicit_zero_points)
    graph.node("Identity", [y], "y")
    inputs, outputs = (BATCH, SEQUENCE, head.spec.inputs), (BATCH, SEQUENCE, head.spec.outputs)
    return part_model(graph, {"x": inputs}, {"y": outputs}, 23)


def test_a_look_up_without_quantization_is_one_gather(tmp_path: Path) -> None:
    file = made(tmp_path, *APART["float"], False)
    ran = executed_kernels(file.path, RunOptions(file.options.session, context=40), random_ids(96, 3))
    assert ran["embed_tokens"] == "Gather"


def stored_bits(file: Lowered) -> int:
    return file.target.kernel(file.checkpoint.records[HEAD].kernel).stored_bits


def tensors(file: Lowered) -> dict[str, int]:
    """Bytes of every tensor in the file."""
    return {tensor.name: len(tensor.raw_data) for tensor in onnx.load(file.path).graph.initializer}
