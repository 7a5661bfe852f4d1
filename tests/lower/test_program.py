"""Whole programs: the same function as the integer reference, whichever way the cache is filled."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from afq_export.arch import decoder
from afq_export.arch.config import DecoderConfig
from afq_export.errors import InputError, VerdictError
from afq_export.lower.executorch.compose import export_program
from afq_export.lower.executorch.decoder import TokenRows
from afq_export.lower.executorch.float_parts import ExecutorchFloatParts
from afq_export.lower.executorch.probe import run_linears
from afq_export.lower.executorch.program import LoweredProgram, lower_program, verify_linears
from afq_export.lower.executorch.readback import read_linears, read_program
from afq_export.progress import silent
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedEmbedding, QuantizedLinear
from afq_export.runtime.executorch import ExecutorchSession
from afq_export.runtime.library import load_runtime
from afq_export.spec.recipe import KvCache
from afq_export.spec.target import Shapes
from afq_export.validate.evaluate import hidden_states
from afq_export.validate.rungs import integer_rung
from tests.checkpoints import KERNELS, random_checkpoint, small_config
from tests.lower.reference import TARGET, random_ids, reference_logits

CONTEXT, PREFILL = 40, 8
SMALL_TARGET = msgspec.structs.replace(TARGET, shapes=Shapes(context=CONTEXT, prefill=PREFILL))
RELATIVE = 1e-5
"""Float32 parts (norms, softmax) differ in their last bits; a flipped int8 step would be 100 times this."""


def mixed(name: str) -> str:
    """Another kernel for every linear, and all of them in one program."""
    return KERNELS[sum(map(ord, name)) % len(KERNELS)]


CASES: dict[str, tuple[DecoderConfig, str | Callable[[str], str], int]] = {
    "llama, int8": (small_config(), "qd8-f32-qc8w", 8),
    "llama, int4 per channel": (small_config(), "qd8-f32-qc4w", 4),
    "llama, rows of 2 bits": (small_config(layers=1), "qd8-f32-qc8w", 2),
    "llama, int4 groups": (small_config(), "qd8-f32-qb4w", 8),
    "llama, static int8": (small_config(), "qs8-qc8w", 32),
    "llama, every kernel": (small_config(), mixed, 4),
    "qwen2 (biases), int4 groups": (small_config("qwen2", layers=1), "qd8-f32-qb4w", 8),
    "qwen3 (q and k norms), int4 groups": (small_config("qwen3", layers=1), "qd8-f32-qb4w", 8),
    "opt, int4 groups": (small_config("opt"), "qd8-f32-qb4w", 8),
    "opt, static int8": (small_config("opt"), "qs8-qc8w", 32),
    "opt, gelu": (small_config("opt", activation="gelu", layers=1), "qd8-f32-qc8w", 8),
    "llama, tanh gelu": (small_config(activation="gelu_tanh", layers=1), "qd8-f32-qc8w", 8),
}


@pytest.mark.parametrize("case", CASES)
def test_program_is_the_integer_reference(case: str, tmp_path: Path) -> None:
    config, kernel, bits = CASES[case]
    checkpoint = random_checkpoint(tmp_path / "quantized", config, kernel, embedding_bits=bits)
    session = save(lower_program(checkpoint, SMALL_TARGET, silent), tmp_path)
    ids = random_ids(config.vocab, 3 * PREFILL + 5)

    expected = reference_logits(checkpoint, ids)
    chunked = session.logits(ids)
    single = torch.cat([session.extend(ids[place : place + 1], place) for place in range(len(ids))])
    assert relative(chunked, expected) < RELATIVE
    assert relative(single, expected) < RELATIVE
    assert torch.equal(session.logits(ids), chunked), "the cache of an earlier sequence shows through"


def test_nothing_of_a_program_stays_in_memory(tmp_path: Path) -> None:
    """Neither its delegates nor their weights, its shapes or generated code, once it is bytes. torch remembers fixed
    shapes elsewhere than symbolic ones: the second program, of one linear, has no others."""

    def left() -> tuple[int, int, int]:
        gc.collect()
        kinds = [type(found) for found in gc.get_objects()]
        return kinds.count(LoweredBackendModule), kinds.count(ShapeEnv), len(graph_module._loader.eval_cache)

    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(layers=1))
    lower_program(checkpoint, SMALL_TARGET, silent)  # what any first program brings with it
    before = left()
    lowered = lower_program(checkpoint, SMALL_TARGET, silent)
    assert lowered.pte and left() == before
    linear = checkpoint.linear("blocks.0.q_proj")
    run_linears([linear], {linear.spec.name: np.zeros((4, linear.spec.inputs), np.float32)})
    assert left() == before


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_the_checkpoints_bit_for_bit(bits: int, group: int) -> None:
    """Every row, every code, in the runtime."""
    random, limit = torch.Generator().manual_seed(bits), 1 << bits - 1
    codes = torch.randint(-limit, limit, (96, 64), dtype=torch.int8, generator=random)
    scales = 0.5 + torch.rand(96, 64 // group if group else 1, generator=random)
    embedding = QuantizedEmbedding(bits, group, codes, scales)
    ids = torch.randperm(96, generator=random)[None]
    program = export_program(TokenRows(embedding), (ids,), []).buffer
    rows = load_runtime()._load_for_executorch_from_buffer(program).forward([ids])[0]
    assert torch.equal(rows[0], embedding.dequantized()[ids[0]])


@pytest.mark.parametrize("cache", [KvCache(8), KvCache(4), KvCache(4, 8)])
def test_a_program_with_a_quantized_cache_is_the_reference_bit_for_bit(cache: KvCache, tmp_path: Path) -> None:
    """Prompts in chunks, over two sequences; and step by step, where other float kernels attend, within rounding."""
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(), kv_cache=cache)
    session = save(lower_program(checkpoint, SMALL_TARGET, silent), tmp_path)
    parts = ExecutorchFloatParts(session.context, session.prefill)
    reference = integer_rung(checkpoint, SMALL_TARGET, parts=parts)
    for count in (3 * PREFILL + 5, CONTEXT):
        ids = random_ids(checkpoint.config.vocab, count)
        with torch.no_grad():
            expected = decoder.head(reference.head(), hidden_states(reference, ids[None]))[0]
        assert torch.equal(session.logits(ids), expected)
    single = torch.cat([session.extend(ids[place : place + 1], place) for place in range(CONTEXT)])
    assert relative(single, expected) < RELATIVE


@dataclasses.dataclass(frozen=True)
class Lowered:
    checkpoint: QuantizedCheckpoint
    program: LoweredProgram
    steps: list[tuple[int, int]]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    checkpoint = random_checkpoint(tmp_path_factory.mktemp("mixed") / "quantized", small_config(), mixed)
    steps: list[tuple[int, int]] = []
    program = lower_program(checkpoint, SMALL_TARGET, lambda label, done, total: steps.append((done, total)))
    return Lowered(checkpoint, program, steps)


def test_one_delegate_a_block_and_nothing_unexpected_outside(lowered: Lowered) -> None:
    content = read_program(lowered.program.pte)
    assert content.delegates == small_config().layers + 1
    assert {name.split("::")[0] for name in content.calls} <= {
        "aten",
        "executorch_prim",
        "llama",
        "quantized_decomposed",
    }
    assert content.calls["llama::custom_sdpa.out"] == small_config().layers
    assert content.calls["llama::update_cache.out"] == 2 * small_config().layers
    assert not [
        name for name in content.calls if any(op in name for op in ("mm", "mul", "mean", "view", "quantize_per"))
    ]


def test_coverage_names_every_linear_and_every_reason(lowered: Lowered) -> None:
    coverage = lowered.program.coverage
    assert [(line.name, line.kernel) for line in coverage.lowered] == [
        (name, record.kernel) for name, record in lowered.checkpoint.records.items()
    ]
    counts = {line.what: line.count for line in coverage.refused}
    assert counts["llama::custom_sdpa"] == 2
    assert counts["quantized_decomposed::embedding_byte"] == 1
    assert all(line.reason for line in coverage.refused)


def test_metadata_is_what_the_runner_asks_for(lowered: Lowered) -> None:
    assert lowered.program.metadata == {
        "get_max_seq_len": PREFILL,
        "get_max_context_len": CONTEXT,
        "get_vocab_size": 96,
        "get_n_layers": 2,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_bos_id": 1,
        "get_eos_ids": [2],
    }


def test_progress_ends_at_its_total(lowered: Lowered) -> None:
    assert lowered.steps[-1] == (4, 4)
    assert [done for done, _ in lowered.steps] == sorted(done for done, _ in lowered.steps)


def test_the_same_checkpoint_gives_the_same_bytes(lowered: Lowered) -> None:
    assert lower_program(lowered.checkpoint, SMALL_TARGET, silent).pte == lowered.program.pte


def test_integers_read_back_are_the_checkpoints(lowered: Lowered) -> None:
    packed = read_linears(lowered.program.pte)
    assert [linear.number for linear in packed] == list(range(1, len(lowered.checkpoint.records) + 1))
    for linear, name in zip(packed, lowered.checkpoint.records, strict=True):
        ours = lowered.checkpoint.linear(name)
        assert np.array_equal(linear.codes, ours.codes.numpy()), name
        assert np.array_equal(linear.scales, ours.scales.numpy()), name


@pytest.mark.parametrize("part", ["codes", "scales", "bias"])
def test_a_program_of_other_integers_is_named(lowered: Lowered, part: str) -> None:
    class Changed(QuantizedCheckpoint):
        """The checkpoint with one number changed after lowering."""

        def linear(self, name: str) -> QuantizedLinear:
            linear = QuantizedCheckpoint.linear(self, name)
            if name != "blocks.1.o_proj":
                return linear
            if part == "bias":
                return dataclasses.replace(linear, bias=torch.zeros(linear.spec.outputs))
            tensor = getattr(linear, part).clone()
            tensor[3, 0] = 0
            return dataclasses.replace(linear, **{part: tensor})

    facts = {field.name: getattr(lowered.checkpoint, field.name) for field in dataclasses.fields(QuantizedCheckpoint)}
    with pytest.raises(VerdictError, match=r"blocks\.1\.o_proj"):
        verify_linears(Changed(**facts), read_linears(lowered.program.pte))


def test_a_missing_linear_is_named(lowered: Lowered) -> None:
    packed = read_linears(lowered.program.pte)
    with pytest.raises(VerdictError, match=r"blocks\.0\.k_proj.*not there"):
        verify_linears(lowered.checkpoint, [linear for linear in packed if linear.number != 2])


@pytest.mark.parametrize("data", [b"", b"no program", bytes(4096)])
def test_other_bytes_are_no_program(data: bytes) -> None:
    with pytest.raises(InputError):
        read_linears(data)


def test_a_call_needs_room_for_two_tokens(lowered: Lowered) -> None:
    target = msgspec.structs.replace(TARGET, shapes=Shapes(context=8, prefill=1))
    with pytest.raises(InputError, match="two tokens"):
        lower_program(lowered.checkpoint, target, silent)


def save(program: LoweredProgram, folder: Path) -> ExecutorchSession:
    path = folder / "model.pte"
    path.write_bytes(program.pte)
    return ExecutorchSession(path)


def relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given - expected).abs().max() / expected.abs().max())
