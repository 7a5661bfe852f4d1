"""Vela's command stream in a .pte, its estimate, and the host's part around it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from afq_export.errors import InputError
from afq_export.lower.tosa.decoder import Shape, write_decoder
from afq_export.lower.tosa.file import write_tosa
from afq_export.lower.tosa.graph import TosaGraph
from afq_export.lower.tosa.host import host_tables
from afq_export.lower.tosa.vela import compile_tosa, layer_of
from afq_export.report.npu import npu_sentence, npu_table
from afq_export.spec.catalog import load_target
from tests.checkpoints import small_config
from tests.lower.tosa.decoders import static_decoder

SHAPE = Shape(4, 12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return static_decoder(tmp_path_factory.mktemp("decoder"), small_config())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.3.attention.concat.2/Transpose", "blocks.3.attention"),
        ("blocks.0.attn_norm.rescale.7_copy", "blocks.0.attn_norm"),
        ("blocks.0.attention.reduce_sum_reducesum", "blocks.0.attention"),
        ("new.1.key", "blocks.1.attention"),
        ("logits", "lm_head"),
        ("final_norm.mul", "final_norm"),
        ("mask_int32", "mask"),
        ("#2993", "unnamed"),
    ],
)
def test_what_vela_calls_an_operator_belongs_to_a_layer(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize("target", ["ethos-u85", "ethos-u55"])
def test_the_whole_decoder_runs_on_the_npu(checkpoint, target: str) -> None:
    pytest.importorskip("ethosu", reason="Arm's Vela is not installed")
    pytest.importorskip("tosa_serializer", reason="Arm's tosa-tools are not installed")
    from afq_export.lower.tosa.program import read_methods, write_program

    graph, tables = write_decoder(checkpoint, SHAPE), host_tables(checkpoint, SHAPE)
    program, options = write_tosa(graph), load_target(target).ethos_u
    compiled = compile_tosa(program, options, graph, 4)
    assert compile_tosa(program, options, graph, 4).stream == compiled.stream, "the same program, the same commands"
    estimate = compiled.estimate
    assert estimate.outside == {} and estimate.cycles > 0 and estimate.accelerator == options.accelerator
    names = [layer.name for layer in estimate.layers]
    assert {"blocks.0.q_proj", "blocks.1.attention", "blocks.1.down_proj", "lm_head"} <= {*names}
    assert names.index("blocks.0.q_proj") < names.index("blocks.1.down_proj") < names.index("lm_head")
    codes = sum(record.spec.outputs * record.spec.inputs for record in checkpoint.records.values())
    assert estimate.flash_bytes > 0.7 * codes and estimate.macs > 4 * codes
    assert "were not" not in npu_sentence(estimate) and "was not executed here" in npu_sentence(estimate)
    assert "blocks.*.q_proj" in npu_table(estimate).markdown()

    if target == "ethos-u85":
        methods = read_methods(write_program({"forward": (graph, compiled.stream)}, tables))
        assert methods["forward"].delegates == (("EthosUBackend", compiled.stream),)
        assert "aten::embedding.out" in methods["forward"].calls


def test_what_vela_refuses_is_said(checkpoint) -> None:
    pytest.importorskip("ethosu", reason="Arm's Vela is not installed")
    pytest.importorskip("tosa_serializer", reason="Arm's tosa-tools are not installed")
    graph = TosaGraph()  # a maximum over 32 bits, which Ethos-U55 has not
    graph.output(graph.reduce("REDUCE_MAX", graph.input("x", "i32", (1, 4, 8))), "y")
    with pytest.raises(InputError, match=r"Vela refuses the program \[ethos-u55-128\]: .*ReduceMax"):
        compile_tosa(write_tosa(graph), load_target("ethos-u55").ethos_u, graph, 4)
    wrong = msgspec.structs.replace(load_target("ethos-u55").ethos_u, system_config="No_Such_System")
    with pytest.raises(InputError, match="No_Such_System"):
        compile_tosa(write_tosa(graph), wrong, graph, 4)


def test_a_program_is_written_whole(tmp_path: Path) -> None:
    """The writer never overwrites: names are unique, constants with equal content are one tensor."""
    graph = TosaGraph("a")
    one = graph.constant(np.ones(3), "i32")
    assert graph.constant(np.ones(3), "i32") is one
    assert graph.constant(np.ones(3), "i32", "codes").name == "a.codes"
    with graph.part("b"):
        assert graph.constant(np.ones(3), "i32", "codes").name == "a.b.codes"
    assert graph.constant(np.ones(3), "i32", "codes").name == "a.codes.2"
