"""Vulkan programs: integers of both kinds of linears read back from the delegate; what it would drop is refused."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from executorch.exir.lowered_backend_module import LoweredBackendModule

from afq_export.backends import vulkan
from afq_export.errors import InputError, MissingToolError, VerdictError
from afq_export.lower.vulkan.evaluate import VulkanReader
from afq_export.lower.vulkan.program import coverage_of, lower_vulkan, verify_vulkan
from afq_export.lower.vulkan.readback import DYNAMIC, WEIGHT_ONLY, VulkanContent, read_vulkan
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.target import Shapes
from afq_export.validate.integer import xnnpack
from afq_export.validate.integer.vulkan import dynamic_per_group
from afq_export.validate.meaning import meaning_check
from tests.checkpoints import random_linear
from tests.lower.onnx.decoders import decoder_checkpoint, decoder_config, random_ids

TARGET = msgspec.structs.replace(load_target("android-vulkan"), shapes=Shapes(context=40, prefill=8))
CASES = {
    "llama dq8ca-q4gsw": ("llama", "w4a8-g32-all4", ()),
    "opt q4gsw-row": ("opt", "w4a16-g32-all4", ("weights.group=0", "head.group=0", "embedding={bits=8, group=0}")),
    "qwen3 q4gsw": ("qwen3", "w4a16-g32-all4", ("embedding={bits=4, group=0}",)),
    "qwen2 dq8ca-q4gsw-row": ("qwen2", "w4a8-g32-all4", ("weights.group=0", "head.group=0", "embedding.bits=32")),
}
SLOW = pytest.mark.slow
"""Lowering takes ExecuTorch many seconds: one of the four is in the daily suite."""


@dataclasses.dataclass(frozen=True)
class Made:
    """One lowered decoder of one block."""

    checkpoint: QuantizedCheckpoint
    pte: bytes

    @functools.cached_property
    def content(self) -> VulkanContent:
        return read_vulkan(self.pte)


def lowered(paths: pytest.TempPathFactory, case: str) -> Made:
    """The decoder of a case, one block."""
    kind, scheme, changes = CASES[case]
    config = decoder_config(kind, layers=1, mlp_bias=kind == "opt")
    checkpoint = decoder_checkpoint(paths.mktemp("q") / "q", config, load_recipe(f"{scheme}+rtn", changes), TARGET)
    return Made(checkpoint, lower_vulkan(checkpoint, TARGET, silent))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Lowers the decoder of a case, once."""
    return functools.cache(lambda case: lowered(tmp_path_factory, case))


@pytest.fixture(params=[next(iter(CASES)), *(pytest.param(case, marks=SLOW) for case in list(CASES)[1:])])
def made(request: pytest.FixtureRequest, cases: Callable[[str], Made]) -> Made:
    return cases(request.param)


def test_nothing_of_a_program_stays_in_memory(made: Made) -> None:
    """Neither its delegate nor its weights, once it is bytes; torch and the partitioner remember both."""

    def left() -> int:
        gc.collect()
        return sum(type(found) is LoweredBackendModule for found in gc.get_objects())

    before = left()
    assert lower_vulkan(made.checkpoint, TARGET, silent) and left() == before


@pytest.fixture
def plain(cases: Callable[[str], Made]) -> Made:
    return cases("llama dq8ca-q4gsw")


def test_the_cases_have_every_kernel() -> None:
    kernels = set()
    for kind, scheme, changes in CASES.values():
        records = assign(decoder_config(kind), load_recipe(scheme, changes), TARGET)
        kernels |= {record.kernel for record in records.values()}
    assert kernels == {kernel.name for kernel in TARGET.kernels}


def test_the_delegate_holds_the_checkpoint(made: Made) -> None:
    """Codes out of their nibbles, scales out of their transposed table, the sums of codes that dynamic kernels keep."""
    assert len(made.content.delegates) == 1
    for name, found in zip(made.checkpoint.records, made.content.linears, strict=True):
        linear = made.checkpoint.linear(name)
        assert np.array_equal(found.codes, linear.codes)
        assert np.array_equal(found.scales, linear.scales)
        assert (found.bias is None) == (linear.bias is None)
        assert found.bias is None or np.array_equal(found.bias, linear.bias)
        assert found.kind == (DYNAMIC if linear.spec.activation else WEIGHT_ONLY)


def test_the_graph_means_the_checkpoint(made: Made) -> None:
    """Twenty tokens in calls of eight, by the meaning of the operators in the file."""
    ids = random_ids(made.checkpoint.config.vocab, 20)
    read = VulkanReader(made.content, made.checkpoint, TARGET.shapes.prefill).logits
    check = meaning_check(read, made.checkpoint, TARGET, ids)
    assert check.status == "passed", check.detail


def test_what_is_not_delegated_is_said(made: Made) -> None:
    coverage = coverage_of(made.checkpoint, made.content)
    assert len(coverage.lowered) == len(made.checkpoint.records)
    said = {one.what: one.reason for one in coverage.refused}
    assert said["sdpa_with_kv_cache.default"].startswith("float")
    outside = [reason for reason in said.values() if reason.startswith("not delegated")]
    assert len(outside) == len({name.rsplit(".", 1)[0] for name in made.content.outline.calls} or ())
    if made.checkpoint.embedding_bits == 8:
        assert "quantized_decomposed::embedding_byte" in said


def changed(content: VulkanContent, place: int, **fields: object) -> VulkanContent:
    """The content with one linear's fields replaced."""
    linears = list(content.linears)
    linears[place] = dataclasses.replace(linears[place], **fields)
    copy = dataclasses.replace(content)
    copy.__dict__["linears"] = linears
    return copy


def flipped(array: np.ndarray) -> np.ndarray:
    other = np.array(array)
    other.reshape(-1)[7] = -other.reshape(-1)[7] - 1
    return other


@pytest.mark.parametrize("field", ["codes", "scales"])
def test_a_planted_fault_is_found(plain: Made, field: str) -> None:
    wrong = flipped(getattr(plain.content.linears[3], field))
    with pytest.raises(VerdictError, match=rf"blocks\.0\.o_proj.*{field} differ"):
        verify_vulkan(plain.checkpoint, changed(plain.content, 3, **{field: wrong}))


def test_a_linear_that_was_left_float_is_found(plain: Made) -> None:
    copy = dataclasses.replace(plain.content)
    copy.__dict__["operators"] = {**plain.content.operators, "aten.linear.default": 1}
    with pytest.raises(VerdictError, match="computes it in float"):
        verify_vulkan(plain.checkpoint, copy)


def test_a_missing_linear_is_found(plain: Made) -> None:
    copy = dataclasses.replace(plain.content)
    copy.__dict__["linears"] = plain.content.linears[:-1]
    with pytest.raises(VerdictError, match="7 of 8 linears"):
        verify_vulkan(plain.checkpoint, copy)


def test_the_order_of_linears_counts(plain: Made) -> None:
    """Linears have no names in the file: two of one shape that changed places are two wrong ones."""
    first, second, *rest = plain.content.linears[1:]
    copy = dataclasses.replace(plain.content)
    copy.__dict__["linears"] = [plain.content.linears[0], second, first, *rest]
    with pytest.raises(VerdictError, match=r"blocks\.0\.k_proj"):
        verify_vulkan(plain.checkpoint, copy)


def test_sums_of_other_codes_are_refused(plain: Made) -> None:
    graph = plain.content.delegates[0]
    with pytest.raises(InputError, match="sums"):
        graph._check_sums(np.ones((8, 32), np.int8), np.zeros((1, 8), np.int32), 32)


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(InputError):
        read_vulkan(b"no program")


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("w8a8-dynamic", "drops the quantization of their input silently"),
        ("w2a16-g64", "stores 2 and 3 bits in 4 silently"),
        ("w3a16-g128", "stores 2 and 3 bits in 4 silently"),
        ("w4a8-g32", "lm_head.*drops the quantization of their input silently"),
    ],
)
def test_the_traps_are_refused_with_their_reason(scheme: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        assign(decoder_config(), load_recipe(scheme), TARGET)


@SLOW
def test_the_trap_is_real(tmp_path: Path) -> None:
    """8-bit weights with dynamic activations: the backend makes a float linear, and the readback finds it."""
    kernels = tuple(msgspec.structs.replace(one, weight_bits=(8,)) for one in TARGET.kernels)
    open_target = msgspec.structs.replace(TARGET, kernels=kernels, refused=())
    recipe = load_recipe("w8a8-dynamic+rtn")
    checkpoint = decoder_checkpoint(tmp_path / "q", decoder_config(layers=1), recipe, open_target)
    with pytest.raises(VerdictError, match=r"computes it in float|0 of 8 linears"):
        lower_vulkan(checkpoint, open_target, silent)


def test_a_kernel_of_another_backend_is_refused() -> None:
    records = assign(decoder_config(), load_recipe("w4a8-g32-all4"), TARGET)
    kernels = tuple(msgspec.structs.replace(one, arithmetic="coreml.weight_only") for one in TARGET.kernels)
    with pytest.raises(InputError, match="no such kernel"):
        vulkan.refuse(msgspec.structs.replace(TARGET, kernels=kernels), records)


def test_there_is_no_session(tmp_path: Path) -> None:
    bundle = type("Bundle", (), {"model": tmp_path / "model.pte"})
    with pytest.raises(MissingToolError, match="nothing here runs Vulkan"):
        vulkan.open_session(bundle)


def test_the_integer_model_is_xnnpacks_but_for_the_order_of_sums() -> None:
    """Same grids, same int32 sums; here they are added in float64."""
    linear = random_linear("qd8-f32-qb4w", 16, 64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(dynamic_per_group(linear, x), xnnpack.dynamic_per_group(linear, x), rtol=0, atol=1e-5)
