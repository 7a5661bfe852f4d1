"""Cortex-M programs: CMSIS-NN's arithmetic against ExecuTorch's reference of it, integers read back, memory refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
import torch

pytest.importorskip("executorch", reason="ExecuTorch is not installed")
pytest.importorskip("tosa_serializer", reason="the passes of ExecuTorch's Cortex-M backend need tosa-tools [ethos-u]")

from afq_export.backends.cortex_m import SMALLER, describe, least_memory, open_session, refuse
from afq_export.errors import InputError, MissingToolError, VerdictError
from afq_export.lower.bundle import Bundle
from afq_export.lower.cortex_m.probe import logits, run_linears
from afq_export.lower.cortex_m.program import Shape, export_program, planned_memory, verify
from afq_export.lower.cortex_m.readback import operators, read_linears
from afq_export.lower.memory import refuse_memory
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint, QuantizedLinear, StaticRange
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.quant import Granularity, LinearSpec, QuantSpec
from afq_export.spec.report import Manifest
from afq_export.spec.target import Shapes
from afq_export.validate.integer.cmsis_nn import requantized, static_per_channel
from afq_export.validate.integer.linear import integer_linear
from afq_export.validate.meaning import meaning_check
from tests.lower.onnx.decoders import decoder_checkpoint, decoder_config, random_ids

SHAPE = Shape(8, 24)
TARGET = msgspec.structs.replace(load_target("cortex-m55"), shapes=Shapes(context=SHAPE.context, prefill=SHAPE.tokens))
SOURCE, RESULT = StaticRange(0.031, -7), StaticRange(0.05, 5)


def linear_of(outputs: int, inputs: int, bits: int = 8, seed: int = 0) -> QuantizedLinear:
    """A linear with random codes, a bias, and stored grids on both sides."""
    random = torch.Generator().manual_seed(seed)
    weight = QuantSpec(bits, Granularity.PER_CHANNEL)
    spec = LinearSpec("blocks.0.q_proj", outputs, inputs, True, weight, QuantSpec(8, Granularity.PER_TENSOR))
    codes = torch.randint(weight.qmin, weight.qmax + 1, (outputs, inputs), dtype=torch.int8, generator=random)
    scales = 4.0 / (weight.qmax * inputs**0.5) * (0.5 + torch.rand(outputs, 1, generator=random))
    bias = torch.randn(outputs, generator=random)
    return QuantizedLinear(LinearRecord(spec, "CONV2D-s8", input=SOURCE, output=RESULT), codes, scales, bias)


def theirs(linear: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(run_linears([linear], {linear.spec.name: x.numpy()})[linear.spec.name])


@pytest.mark.parametrize(("outputs", "inputs", "bits"), [(48, 64, 8), (33, 172, 8), (7, 33, 4), (20, 576, 2)])
@pytest.mark.parametrize("size", [0.01, 1.0, 50.0])
def test_kernels_of_cortex_m55_are_the_integer_model(outputs: int, inputs: int, bits: int, size: float) -> None:
    """Bit for bit; with small scales as well, so that codes saturate on neither side, one, or both."""
    linear = linear_of(outputs, inputs, bits, seed=inputs)
    x = torch.randn(40, inputs, generator=torch.Generator().manual_seed(bits)) * size
    assert torch.equal(static_per_channel(linear, x), theirs(linear, x))
    without = dataclasses.replace(linear, bias=None)
    assert torch.equal(static_per_channel(without, x), theirs(without, x))


def test_rows_are_float() -> None:
    linear = linear_of(40, 64)
    record = msgspec.structs.replace(linear.record, input=None, output=None)
    linear, x = dataclasses.replace(linear, record=record, bias=None), torch.randn(9, 64)
    ours = integer_linear("cmsis_nn.rows", linear, x)
    assert (ours - theirs(linear, x)).abs().max() <= TARGET.kernel("rows").max_relative_error * ours.abs().max()


@pytest.mark.parametrize("shift", [3, 1, 0, -1, -5, -12])
def test_both_roundings_are_cmsis_nn_s(shift: int) -> None:
    """Sums of either sign that fall between two results, in the product and in the shift."""
    from executorch.backends.cortex_m.passes.passes_utils import requantize_cmsis

    sums = torch.cat([torch.arange(-3000, 3000), torch.randint(-(2**24), 2**24, (3000,))]).long()
    for multiplier in (1 << 30, (1 << 31) - 1, 1518500250, (1 << 30) + 1):
        ours = requantized(sums, torch.tensor(multiplier), torch.tensor(shift))
        assert torch.equal(ours, requantize_cmsis(sums, multiplier, shift).long())


def checkpoint_of(kind: str, folder: Path) -> QuantizedCheckpoint:
    config = decoder_config(kind, layers=1, tied=True)
    return decoder_checkpoint(folder, config, load_recipe("w8a8-static"), TARGET)


@pytest.fixture(scope="module", params=["qwen2", "opt"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return checkpoint_of(request.param, tmp_path_factory.mktemp("cortex") / "quantized")


@pytest.fixture(scope="module")
def program(checkpoint: QuantizedCheckpoint) -> bytes:
    return export_program(checkpoint, SHAPE, silent)


def test_every_integer_is_read_back(checkpoint: QuantizedCheckpoint, program: bytes, tmp_path: Path) -> None:
    found = verify(checkpoint, program)
    for stored, name in zip(found, checkpoint.records, strict=True):
        assert (torch.from_numpy(stored.codes.copy()) == checkpoint.linear(name).codes).all()
    counts = operators(program)
    assert counts["cortex_m::quantized_conv2d"] == len(checkpoint.records) - 1
    assert planned_memory(program) > 0
    (tmp_path / "model.pte").write_bytes(program)
    facts, linears = describe(tmp_path / "model.pte")
    assert len(linears) == len(checkpoint.records) and "bytes" in facts["SRAM of a call"]


def test_another_code_is_found(checkpoint: QuantizedCheckpoint, program: bytes) -> None:
    """One bit of one weight."""
    name = list(checkpoint.records)[2]
    codes = checkpoint.linear(name).codes.numpy().tobytes()
    place = program.index(codes)
    changed = program[: place + 9] + bytes([program[place + 9] ^ 1]) + program[place + 10 :]
    with pytest.raises(VerdictError, match=rf"not the checkpoint \[{name}\]: codes differ"):
        verify(checkpoint, changed)
    with pytest.raises(InputError, match="not an ExecuTorch program"):
        read_linears(b"no program" * 10)


def test_the_whole_decoder_is_the_integer_reference(checkpoint: QuantizedCheckpoint) -> None:
    """In calls of the program's length, the last one padded, the caches kept outside."""
    ids = random_ids(checkpoint.config.vocab, 2 * SHAPE.tokens + 3)
    check = meaning_check(lambda part: logits(checkpoint, SHAPE, part), checkpoint, TARGET, ids)
    assert check.status == "passed" and "same token at 100.0%" in check.detail, check.detail


def test_what_does_not_fit_is_refused_with_figures() -> None:
    recipe = load_recipe("w8a8-static")
    large = decoder_config(hidden=576, intermediate=1536, head_dim=64, vocab=49152)
    records = assign(large, recipe, TARGET)
    flash, sram = least_memory(TARGET, records)
    assert flash > 2 * 49152 * 576 and sram > 4 * 49152 * 576
    with pytest.raises(InputError, match=r"does not fit into the target's flash.*takes at least [\d,]+ KiB.*flash_kb"):
        refuse(TARGET, records)
    with pytest.raises(InputError, match=r"SRAM.*it takes 4,097 KiB, cortex_m.sram_kb is 4,096"):
        refuse_memory(TARGET.cortex_m, "cortex_m", 1, 4097 * 1024, "here", smaller=SMALLER)
    refuse(TARGET, assign(decoder_config(), recipe, TARGET))
    with pytest.raises(InputError, match="takes static activations, not dynamic"):
        assign(decoder_config(), load_recipe("w8a8-dynamic"), TARGET)


def test_nothing_here_runs_the_program(tmp_path: Path) -> None:
    manifest = Manifest(
        files={}, model=None, recipe="", target="", program="model.pte", versions={}, seed=0, command=()
    )
    with pytest.raises(MissingToolError, match="cannot run here"):
        open_session(Bundle(tmp_path, manifest))
