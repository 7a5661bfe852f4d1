"""Whole decoders: the graph against itself in other calls, against float, and against Arm's reference model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from afq_export.errors import InputError, VerdictError
from afq_export.lower.tosa.decoder import Shape, write_decoder
from afq_export.lower.tosa.file import write_tosa
from afq_export.lower.tosa.graph import TosaGraph
from afq_export.lower.tosa.host import call_inputs, host_tables, load_tables, save_tables
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.runtime.tosa import TosaSession, reference_model
from afq_export.validate.integer.tosa import run_graph
from afq_export.validate.rungs import fake_quant_rung
from tests.checkpoints import random_checkpoint, random_windows, small_config
from tests.lower.tosa.decoders import static_decoder

CASES = [("llama", 8), ("llama", 4), ("qwen2", 8), ("qwen3", 4)]
SHAPE = Shape(8, 24)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], QuantizedCheckpoint]:
    made: dict[tuple[str, int], QuantizedCheckpoint] = {}

    def checkpoint(kind: str, bits: int) -> QuantizedCheckpoint:
        if (kind, bits) not in made:
            made[kind, bits] = static_decoder(tmp_path_factory.mktemp("decoder"), small_config(kind), bits)
        return made[kind, bits]

    return checkpoint


def session(checkpoint: QuantizedCheckpoint, shape: Shape = SHAPE, graph: TosaGraph | None = None) -> TosaSession:
    """The decoder on our operators."""
    graph = graph or write_decoder(checkpoint, shape)
    tables = host_tables(checkpoint, shape)
    return TosaSession(graph, tables, lambda inputs: run_graph(graph, inputs), Path("model.tosa"))


@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_the_reference_model_gives_the_same_bits(checkpoints, kind: str, bits: int) -> None:
    pytest.importorskip("tosa_reference_model", reason="Arm's tosa-tools are not installed")
    pytest.importorskip("tosa_serializer", reason="Arm's tosa-tools are not installed")
    checkpoint = checkpoints(kind, bits)
    graph, tables = write_decoder(checkpoint, SHAPE), host_tables(checkpoint, SHAPE)
    execute = reference_model(write_tosa(graph), tuple(graph.inputs), tuple(graph.outputs))
    theirs = TosaSession(graph, tables, execute, Path("model.tosa"))
    for ids in random_windows(checkpoint.config, count=2, length=24).ids_NT:
        assert torch.equal(session(checkpoint, graph=graph).logits(ids), theirs.logits(ids))
    inputs = call_inputs(tables, np.arange(8), 5, 8)
    inputs |= {
        name: np.random.default_rng(0).integers(-128, 128, graph.values[name].shape).astype(np.int8)
        for name in graph.inputs
        if name.startswith("past.")
    }
    ours, other = run_graph(graph, inputs), execute(inputs)
    assert ours.keys() == other.keys() and all(np.array_equal(ours[name], other[name]) for name in ours)


@pytest.mark.parametrize("tokens", [1, 3])
def test_calls_of_other_lengths_give_the_same_bits(checkpoints, tokens: int) -> None:
    checkpoint = checkpoints("llama", 8)
    ids = random_windows(checkpoint.config, length=20).ids_NT[0]
    assert torch.equal(session(checkpoint, Shape(tokens, 24)).logits(ids), session(checkpoint).logits(ids))


def test_a_sequence_goes_on_where_it_stopped(checkpoints) -> None:
    checkpoint = checkpoints("qwen2", 8)
    ids = random_windows(checkpoint.config, length=20).ids_NT[0]
    whole = session(checkpoint).logits(ids)
    parts = session(checkpoint)
    assert torch.equal(torch.cat((parts.logits(ids[:13]), parts.extend(ids[13:], 13))), whole)
    generated = session(checkpoint).generate(ids[:5], 4, frozenset())
    assert generated[0] == int(whole[4].argmax()) and len(generated) == 4
    stop = generated[-1]
    expected = generated[: generated.index(stop)]
    assert session(checkpoint).generate(ids[:5], 4, frozenset({stop})) == expected


@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_the_integers_compute_what_fake_quantization_does(checkpoints, kind: str, bits: int) -> None:
    """Random weights amplify every code, so this is about gross errors: a wrong scale, a missing zero point."""
    checkpoint = checkpoints(kind, bits)
    ids = random_windows(checkpoint.config, count=4, length=16, seed=1).ids_NT
    from afq_export.validate.evaluate import measure

    found = measure({"fake": fake_quant_rung(checkpoint), "ours": session(checkpoint)}, ids, [("fake", "ours")])
    assert float(found.pairs["fake", "ours"].kl.mean()) < 0.02


def test_another_integer_is_found(checkpoints) -> None:
    pytest.importorskip("tosa_serializer", reason="Arm's tosa-tools are not installed")
    from afq_export.lower.tosa.read import read_linears, read_tosa, same_graph, verify_tosa

    checkpoint = checkpoints("llama", 8)
    graph = write_decoder(checkpoint, SHAPE)
    found = read_tosa(write_tosa(graph), "model.tosa")
    assert same_graph(graph, found) == ""
    verify_tosa(found, checkpoint, SHAPE)
    assert list(read_linears(found)) == list(checkpoint.records)
    name = "blocks.1.up_proj.codes"
    changed = found.constants[name].copy()
    changed.flat[7] ^= 1
    found.constants[name] = changed
    with pytest.raises(VerdictError, match=r"integers \[blocks.1.up_proj\]"):
        verify_tosa(found, checkpoint, SHAPE)
    other = read_tosa(write_tosa(graph), "model.tosa")
    other.operators.pop(20)
    with pytest.raises(VerdictError, match=r"is not the checkpoint's \[operators\]"):
        verify_tosa(other, checkpoint, SHAPE)
    with pytest.raises(InputError, match="not a TOSA program"):
        read_tosa(b"nothing of the kind", "model.tosa")


def test_tables_are_read_back(checkpoints, tmp_path: Path) -> None:
    tables = host_tables(checkpoints("llama", 8), SHAPE)
    save_tables(tables, tmp_path / "tables")
    found = load_tables(tmp_path / "tables")
    assert (found.logit_step, found.shape) == (tables.logit_step, SHAPE)
    assert all(np.array_equal(getattr(found, n), getattr(tables, n)) for n in ("rows", "row_steps", "cos", "sin"))
    (tmp_path / "tables").write_bytes(b"no tables")
    with pytest.raises(InputError, match="cannot read the host's tables"):
        load_tables(tmp_path / "tables")


def test_a_layer_norm_is_refused(tmp_path: Path) -> None:
    from afq_export.lower.tosa.decoder import TosaOps
    from afq_export.lower.tosa.operand import Operand

    checkpoint = random_checkpoint(tmp_path, small_config("opt"))
    graph = TosaGraph()
    x = Operand(graph, graph.input("x", "i16", (1, 2, 64)), 0.1)
    with pytest.raises(InputError, match="LayerNorm has no integer form"):
        TosaOps(checkpoint.config, {}, {}, {}).norm("attn_norm", x)


def test_the_check_of_single_tokens_can_fail(checkpoints) -> None:
    from afq_export.backends.ethos_u import decode_check

    checkpoint = checkpoints("llama", 8)
    ids = random_windows(checkpoint.config, length=10).ids_NT[0]
    graph, alone = write_decoder(checkpoint, SHAPE), write_decoder(checkpoint, Shape(1, SHAPE.past))

    def both(decode) -> TosaSession:
        tables = host_tables(checkpoint, SHAPE)
        return TosaSession(graph, tables, lambda given: run_graph(graph, given), Path("model.tosa"), decode)

    passed = decode_check(both(lambda given: run_graph(alone, given)), ids)
    assert (passed.status, passed.detail[:34]) == ("passed", "10 tokens one by one give the same")
    name = "blocks.1.up_proj.codes"
    alone.constants[name] = alone.constants[name] ^ 1
    assert decode_check(both(lambda given: run_graph(alone, given)), ids).status == "failed"
