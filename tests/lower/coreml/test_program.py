"""Core ML programs: every family and kernel, read back from package and .pte, computed as their operations mean."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
import torch
from coremltools.proto import Model_pb2

from afq_export.backends import coreml
from afq_export.errors import InputError, MissingToolError, VerdictError
from afq_export.lower.coreml.evaluate import PackageReader
from afq_export.lower.coreml.package import MODEL, WEIGHTS, delegate_bytes, unpack_delegate
from afq_export.lower.coreml.program import coverage_of, lower_coreml, read_delegate, verify_package
from afq_export.lower.coreml.readback import DEQUANTIZE, Content, read_package
from afq_export.lower.executorch.readback import read_outline
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.target import Shapes, TargetProfile
from afq_export.validate.meaning import meaning_check
from tests.lower.onnx.decoders import decoder_checkpoint, decoder_config, random_ids

TARGET = msgspec.structs.replace(load_target("ios-coreml"), shapes=Shapes(context=40, prefill=8))
CASES = {
    "llama int4-group": ("llama", "w4a16-g32", ()),
    "qwen3 int4-channel": ("qwen3", "w4a16-g32", ("weights.group=0", "head.group=0", "embedding.bits=4")),
    "opt int8-channel": ("opt", "w4a16-g32", ("weights={bits=8}", "head.group=0", "embedding.bits=32")),
    "qwen2 int8-group": ("qwen2", "w4a16-g32", ("weights={bits=8, group=32}", "embedding={bits=4, group=32}")),
}
"""Kernels by name, every family, every embedding."""


@dataclasses.dataclass(frozen=True)
class Made:
    """One lowered decoder."""

    checkpoint: QuantizedCheckpoint
    target: TargetProfile
    package: Path
    pte: bytes

    @functools.cached_property
    def content(self) -> Content:
        return read_package(self.package)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Lowers the decoder of a case, once."""
    return functools.cache(lambda case: lowered(tmp_path_factory, case))


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, cases: Callable[[str], Made]) -> Made:
    return cases(request.param)


@pytest.fixture(scope="module")
def plain(cases: Callable[[str], Made]) -> Made:
    """One with two blocks, which tests take apart in copies."""
    return cases("llama int4-group")


def lowered(paths: pytest.TempPathFactory, case: str) -> Made:
    """The decoder of a case: two blocks of Llama, one of the others."""
    folder, (kind, scheme, changes) = paths.mktemp("made"), CASES[case]
    config = decoder_config(kind, layers=2 if kind == "llama" else 1)
    checkpoint = decoder_checkpoint(folder / "q", config, load_recipe(f"{scheme}+rtn", changes), TARGET)
    pte = lower_coreml(checkpoint, TARGET, folder / "model.mlpackage", {"model": "random"}, silent)
    return Made(checkpoint, TARGET, folder / "model.mlpackage", pte)


def test_the_cases_have_every_kernel(request: pytest.FixtureRequest) -> None:
    kernels = set()
    for kind, scheme, changes in CASES.values():
        records = assign(decoder_config(kind), load_recipe(scheme, changes), TARGET)
        kernels |= {record.kernel for record in records.values()}
    assert kernels == {kernel.name for kernel in TARGET.kernels}


def test_package_and_delegate_hold_the_checkpoint(made: Made) -> None:
    """`lower_coreml` has verified both; what it verifies with is checked below and by the planted faults."""
    inside = read_delegate(made.pte)
    assert [one.outputs for one in inside.operations] == [one.outputs for one in made.content.operations]
    for name, linear in made.content.linears():
        expected = made.checkpoint.linear(original(made.checkpoint, name))
        assert np.array_equal(linear.codes, expected.codes)
        assert linear.scales.dtype == np.float16
        assert np.array_equal(linear.scales.astype(np.float32), expected.scales)
        bits = 4 if expected.spec.weight.bits <= 4 else 8
        assert linear.kind == f"int{bits}"
    verify_package(made.checkpoint, inside)


def original(checkpoint: QuantizedCheckpoint, name: str) -> str:
    return next(one for one in checkpoint.records if one.replace(".", "_") == name)


def test_the_program_means_the_checkpoint(made: Made) -> None:
    """Twenty tokens in calls of eight: weights, caches, masks and positions of the saved file."""
    ids = random_ids(made.checkpoint.config.vocab, 20)
    check = meaning_check(PackageReader(made.content).logits, made.checkpoint, made.target, ids)
    assert check.status == "passed", check.detail
    assert "same token at 100.0%" in check.detail or made.checkpoint.config.family == "opt"


def test_a_call_at_position_0_starts_afresh(plain: Made) -> None:
    reader, ids = PackageReader(plain.content), random_ids(plain.checkpoint.config.vocab, 12)
    first = reader.logits(ids)
    reader.logits(random_ids(plain.checkpoint.config.vocab, 30, seed=1))
    assert torch.equal(reader.logits(ids), first)


def test_calls_of_any_size_give_the_same(plain: Made) -> None:
    """A prompt at once and token by token: the mask and the cache's positions are right."""
    reader, single = PackageReader(plain.content), PackageReader(plain.content)
    single.prefill = 1
    ids = random_ids(plain.checkpoint.config.vocab, 16)
    assert torch.allclose(reader.logits(ids), single.logits(ids), atol=2e-2)


def test_states_interface_and_version(plain: Made) -> None:
    config, content = plain.checkpoint.config, plain.content
    cache = (1, config.kv_heads, 40, config.head_dim)
    named = {f"{kind}_cache_{index}": cache for index in range(config.layers) for kind in ("key", "value")}
    assert content.states == named
    assert content.inputs == ("tokens", "input_pos") and content.outputs == ("logits",)
    assert content.prefill == 8 and content.opset == "CoreML8"
    model = Model_pb2.Model.FromString((plain.package / MODEL).read_bytes())
    assert model.specificationVersion == 9  # iOS 18
    assert dict(model.description.metadata.userDefined)["afq_export.model"] == "random"


def test_a_later_system_is_the_targets_to_ask_for(tmp_path: Path) -> None:
    later = msgspec.structs.replace(TARGET, coreml=msgspec.structs.replace(TARGET.coreml, deployment_target="iOS26"))
    checkpoint = decoder_checkpoint(tmp_path / "q", decoder_config(layers=1), load_recipe("w4a16-g32+rtn"), later)
    lower_coreml(checkpoint, later, tmp_path / "p.mlpackage", {}, silent)
    assert Model_pb2.Model.FromString((tmp_path / "p.mlpackage" / MODEL).read_bytes()).specificationVersion == 10


def test_everything_is_delegated_and_said(plain: Made) -> None:
    outline = read_outline(plain.pte)
    assert outline.delegate_calls == 1 and outline.calls == {}
    coverage = coverage_of(plain.checkpoint, plain.content, outline.calls)
    assert len(coverage.lowered) == len(plain.checkpoint.records)
    floats = {one.what: one.count for one in coverage.refused}
    assert floats["rsqrt"] == 2 * plain.checkpoint.config.layers + 1
    assert floats["scaled_dot_product_attention"] == plain.checkpoint.config.layers


def test_the_same_checkpoint_gives_the_same_bytes(plain: Made, tmp_path: Path) -> None:
    again = lower_coreml(plain.checkpoint, plain.target, tmp_path / "again", {"model": "random"}, silent)
    assert again == plain.pte
    for name in (MODEL, WEIGHTS, Path("Manifest.json")):
        assert (tmp_path / "again" / name).read_bytes() == (plain.package / name).read_bytes()


def test_the_delegate_is_the_package(plain: Made, tmp_path: Path) -> None:
    package = unpack_delegate(delegate_bytes(plain.package), tmp_path)
    for name in (MODEL, WEIGHTS, Path("Manifest.json")):
        assert (package / name).read_bytes() == (plain.package / name).read_bytes()


def codes(content: Content) -> None:
    """One code of one linear."""
    _other(content, "blocks_1_down_proj_weight", "data", 3)


def scale(content: Content) -> None:
    """One scale."""
    _other(content, "blocks_0_q_proj_weight", "scale", 1)


def rows(content: Content) -> None:
    """One code of the token rows."""
    _other(content, "embed_tokens", "data", 5)


def norm(content: Content) -> None:
    """One gain of a norm."""
    name = next(n for n, a in content.constants.items() if a.shape == (64,) and a.dtype == np.float32)
    content.constants[name] = content.constants[name] + np.float32(0.5)


def _other(content: Content, value: str, part: str, place: int) -> None:
    operation = next(one for one in content.operations if one.outputs == (value,))
    given = operation.inputs[part][0]
    array = np.array(content.constants[given] if isinstance(given, str) else given)
    old = array.reshape(-1)[place]
    array.reshape(-1)[place] = old + old.dtype.type(1) if int(old) < 7 else old - old.dtype.type(1)
    operation.inputs[part] = (array,)


@pytest.mark.parametrize(
    ("plant", "said"),
    [(codes, "blocks.1.down_proj.*codes"), (scale, "blocks.0.q_proj.*scales"), (rows, "embed_tokens"), (norm, "norm")],
)
def test_a_planted_fault_is_found(plain: Made, plant, said: str) -> None:
    content = read_package(plain.package)
    plant(content)
    with pytest.raises(VerdictError, match=said):
        verify_package(plain.checkpoint, content)


def test_a_missing_linear_is_found(plain: Made) -> None:
    content = plain.content
    kept = tuple(one for one in content.operations if one.outputs != ("lm_head",))
    with pytest.raises(VerdictError, match=r"lm_head.*not there"):
        verify_package(plain.checkpoint, dataclasses.replace(content, operations=kept))


def test_a_wrong_program_is_not_read_as_right(plain: Made) -> None:
    """The reading notices what the readback of integers cannot: an operation that does something else."""
    changed = (dataclasses.replace(one, kind="relu") if one.kind == "silu" else one for one in plain.content.operations)
    content = dataclasses.replace(plain.content, operations=tuple(changed))
    verify_package(plain.checkpoint, content)
    ids = random_ids(plain.checkpoint.config.vocab, 20)
    tight = msgspec.structs.replace(plain.target, perplexity_budget=1e-3)
    assert meaning_check(PackageReader(content).logits, plain.checkpoint, tight, ids).status == "failed"


def test_int4_is_stored_in_half_bytes(plain: Made) -> None:
    weights = sum(record.spec.outputs * record.spec.inputs for record in plain.checkpoint.records.values())
    assert (plain.package / WEIGHTS).stat().st_size < 1.5 * weights
    data = [one.inputs["data"][0] for one in plain.content.operations if one.kind == DEQUANTIZE]
    assert sum(codes.dtype == np.dtype(ml_dtypes.int4) for codes in data) == len(plain.checkpoint.records) - 1


@pytest.mark.parametrize("path", [MODEL, WEIGHTS])
def test_a_broken_package_is_refused(plain: Made, tmp_path: Path, path: Path) -> None:
    package = unpack_delegate(delegate_bytes(plain.package), tmp_path)
    (package / path).write_bytes((package / path).read_bytes()[:100])
    with pytest.raises(InputError, match="Core ML package"):
        read_package(package)


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_package(tmp_path)
    with pytest.raises(InputError):
        read_delegate(b"no program")


def test_dynamic_activations_are_refused() -> None:
    with pytest.raises(InputError, match="takes none activations, not dynamic"):
        assign(decoder_config(), load_recipe("w4a8-g32"), load_target("ios-coreml"))


def test_a_target_without_its_table_is_refused() -> None:
    target = msgspec.structs.replace(TARGET, coreml=None)
    with pytest.raises(InputError, match=r"\[coreml\]"):
        coreml.refuse(target, {})


def test_a_kernel_of_another_backend_is_refused() -> None:
    records = assign(decoder_config(), load_recipe("w4a16-g32"), TARGET)
    kernels = tuple(msgspec.structs.replace(one, arithmetic="vulkan.weight_only") for one in TARGET.kernels)
    with pytest.raises(InputError, match="Core ML has no such kernel"):
        coreml.refuse(msgspec.structs.replace(TARGET, kernels=kernels), records)


def test_missing_coremltools_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "coremltools" else find(name))
    with pytest.raises(MissingToolError, match=r"afq-export\[coreml\]"):
        coreml.refuse(TARGET, {})
