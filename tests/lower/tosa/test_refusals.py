"""What Ethos-U targets refuse before any work, with figures."""

from __future__ import annotations

import msgspec
import pytest

from afq_export.arch.config import DecoderConfig, Rope
from afq_export.backends import backend, ethos_u
from afq_export.errors import InputError
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import load_recipe, load_target
from tests.checkpoints import small_config

SMOLLM2 = DecoderConfig(
    family="llama",
    model_type="llama",
    hidden=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocab=49152,
    max_positions=8192,
    norm_eps=1e-5,
    activation="silu",
    tied=True,
    rope=Rope(tuple(100000.0 ** -(j / 32) for j in range(32))),
)
"""The shape of SmolLM2-135M."""


def records(config: DecoderConfig, target: str, recipe: str = "w8a8-static"):
    return assign(config, load_recipe(recipe), load_target(target))


@pytest.mark.parametrize(
    ("target", "recipe", "flash"),
    [("ethos-u85", "w8a8-static", "290,304"), ("ethos-u55", "w4a8-static", "186,624")],
)
def test_smollm2_does_not_fit_into_flash(target: str, recipe: str, flash: str) -> None:
    found = records(SMOLLM2, target, recipe)
    with pytest.raises(InputError) as refused:
        backend("ethos-u").refuse(load_target(target), found)
    limit = f"{load_target(target).ethos_u.flash_kb:,}"
    assert f"does not fit into the target's flash [{target}]: it takes at least {flash} KiB" in str(refused.value)
    assert f"ethos_u.flash_kb is {limit}" in str(refused.value) and refused.value.exit_code == 2


def test_smollm2_does_not_fit_into_sram_even_where_flash_is_large() -> None:
    target = load_target("ethos-u85")
    roomy = msgspec.structs.replace(target, ethos_u=msgspec.structs.replace(target.ethos_u, flash_kb=1 << 20))
    _, sram = ethos_u.least_memory(roomy, records(SMOLLM2, "ethos-u85"))
    # The cache of 30 blocks, its new entries, and logits of 32 tokens in 16 bits.
    assert sram == 2 * 30 * 192 * (128 + 32) + 2 * 32 * 49152
    with pytest.raises(InputError, match=r"target's SRAM \[ethos-u85\]: it takes at least 4,872 KiB"):
        ethos_u.refuse(roomy, records(SMOLLM2, "ethos-u85"))


def test_a_family_without_an_integer_form_is_refused() -> None:
    with pytest.raises(InputError, match="no integer LayerNorm"):
        ethos_u.refuse(load_target("ethos-u85"), records(small_config("opt"), "ethos-u85"))


def test_a_target_without_its_table_is_refused() -> None:
    target = msgspec.structs.replace(load_target("ethos-u85"), ethos_u=None)
    with pytest.raises(InputError, match=r"has no \[ethos_u\] table"):
        ethos_u.refuse(target, records(small_config(), "ethos-u85"))


@pytest.mark.parametrize("recipe", ["w8a8-static", "w4a8-static"])
@pytest.mark.parametrize("target", ["ethos-u85", "ethos-u55"])
def test_every_linear_is_static_per_row(target: str, recipe: str) -> None:
    found = records(small_config(), target, recipe)
    assert {record.kernel for record in found.values()} == {"CONV2D"}
    assert {record.spec.activation.bits for record in found.values()} == {8}
    assert not any(record.note or record.spec.activation.dynamic for record in found.values())


def test_dynamic_activations_are_refused() -> None:
    for recipe in ("w8a8-dynamic", "w4a8-g32", "w4a16-g32"):
        with pytest.raises(InputError, match="no kernel"):
            records(small_config(), "ethos-u85", recipe)
