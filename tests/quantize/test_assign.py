"""Recipe against target: kernels, fallbacks, refusals."""

from __future__ import annotations

import msgspec
import pytest

from afq_export.errors import InputError
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.quant import ScaleType
from afq_export.spec.recipe import Override, Weights
from tests.models import llama_config

TARGET = load_target("android-xnnpack")
KERNELS = {
    "w8a8-dynamic": "qd8-f32-qc8w",
    "w8a8-static": "qs8-qc8w",
    "w4a8": "qd8-f32-qc4w",
    "w4a8-g32": "qd8-f32-qb4w",
    "w4a8-g128": "qd8-f32-qb4w",
}


@pytest.mark.parametrize(("recipe", "kernel"), KERNELS.items())
def test_every_shipped_scheme_has_its_kernel(recipe: str, kernel: str) -> None:
    config = llama_config(hidden=128, heads=4, head_dim=32, intermediate=256)
    records = assign(config, load_recipe(recipe), TARGET)
    assert {r.kernel for name, r in records.items() if name != "lm_head"} == {kernel}
    assert records["lm_head"].kernel == "qd8-f32-qc8w"
    assert len(records) == 7 * config.layers + 1
    assert not any(r.note for r in records.values())


def test_groups_that_do_not_fit_fall_back_to_rows_with_a_note() -> None:
    config = llama_config(hidden=64, heads=8, head_dim=8, intermediate=172)
    records = assign(config, load_recipe("w4a8-g32"), TARGET)
    down = records["blocks.0.down_proj"]
    assert down.kernel == "qd8-f32-qc4w"
    assert "172 inputs are not a multiple of 32" in down.note
    assert records["blocks.0.q_proj"].spec.weight.scale_type is ScaleType.BFLOAT16


def test_refuse_means_refuse() -> None:
    config = llama_config(hidden=64, heads=8, head_dim=8, intermediate=172)
    with pytest.raises(InputError, match=r"no kernel .*blocks\.0\.down_proj.*172"):
        assign(config, load_recipe("w4a8-g32", ('fallback="refuse"',)), TARGET)


def test_odd_inputs_need_eight_bits() -> None:
    """Per-channel int4 with an odd K gives a wrong row in the runtime: never silently."""
    config = llama_config(hidden=32, intermediate=33)
    with pytest.raises(InputError, match="multiple of 2 inputs, not 33"):
        assign(config, load_recipe("w4a8"), TARGET)
    records = assign(config, load_recipe("w4a8", ('fallback="int8"',)), TARGET)
    assert records["blocks.1.down_proj"].spec.weight.bits == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("weights.symmetric=false",), "symmetric weights only"),
        (('activations.mode="none"',), "dynamic activations, not none"),
        (("activations.bits=4",), "8-bit activations, not 4"),
    ],
)
def test_what_the_runtime_would_do_silently_wrong_is_refused(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assign(llama_config(), load_recipe("w8a8-dynamic", changes), TARGET)


def test_the_last_override_that_matches_wins() -> None:
    recipe = msgspec.structs.replace(
        load_recipe("w4a8"), override=(Override("blocks.*", bits=3), Override("blocks.1.*_proj", bits=8))
    )
    records = assign(llama_config(), recipe, TARGET)
    assert records["blocks.0.q_proj"].spec.weight.bits == 3
    assert records["blocks.1.q_proj"].spec.weight.bits == 8


def test_an_override_that_matches_nothing_is_an_error() -> None:
    recipe = msgspec.structs.replace(load_recipe("w4a8"), override=(Override("blocks.*.fc9", bits=8),))
    with pytest.raises(InputError, match="matches no layer"):
        assign(llama_config(), recipe, TARGET)


def test_the_head_has_its_own_grid() -> None:
    recipe = msgspec.structs.replace(load_recipe("w8a8-dynamic"), head=Weights(bits=4, group=32))
    assert assign(llama_config(), recipe, TARGET)["lm_head"].kernel == "qd8-f32-qb4w"


def test_a_static_head_is_refused_before_anything_is_calibrated() -> None:
    recipe = load_recipe("w8a8-static+rtn", ('override=[{pattern="*", activations="static"}]',))
    with pytest.raises(InputError, match="no static lm_head"):
        assign(llama_config(), recipe, load_target("linux-x64-ort"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", ["intel-openvino", "ios-coreml", "android-vulkan", "android-qnn-htp", "ethos-u85"])
def test_targets_without_a_quantized_cache_say_so(target: str, bits: int) -> None:
    profile = load_target(target)
    recipe = load_recipe(profile.default_recipe, (f"kv_cache.bits={bits}",))
    with pytest.raises(
        InputError, match=rf"no such KV cache .*{target}: kv_cache.bits = {bits}.*take one of 32"
    ) as found:
        assign(llama_config(), recipe, profile)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("kv_cache.bits=8", "kv_cache.group=4"), "cache groups do not fit .*kv_cache.group = 4.*not a multiple"),
        (("kv_cache.bits=4",), "no 4-bit cache .*heads have 9 numbers"),
    ],
)
def test_caches_that_do_not_fit_the_heads(changes: tuple[str, ...], message: str) -> None:
    config = llama_config(head_dim=9)
    with pytest.raises(InputError, match=message):
        assign(config, load_recipe("w8a8-dynamic", changes), load_target("linux-x64-ort"))
