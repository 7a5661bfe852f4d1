"""Which grids there are to choose from."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from afq_export.errors import InputError
from afq_export.job import Prepared
from afq_export.quantize.assign import assign
from afq_export.sensitivity.options import find_options, linear_options, row_options
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.recipe import Embedding, Override
from afq_export.spec.target import Yes
from tests.models import llama_config

Make = Callable[..., Prepared]


def grids(target: str, recipe: str, name: str = "blocks.0.down_proj", **config: int) -> list[str]:
    profile = load_target(target)
    records = assign(llama_config(**config), load_recipe(recipe), profile)
    found = linear_options(records[name], profile)
    for record in found:
        answer = profile.supports(record.spec)
        assert isinstance(answer, Yes) and answer.kernel.name == record.kernel
        assert record.spec.weight.scale_type is answer.kernel.scale_type
    return [str(record.spec.weight) for record in found]


def test_what_xnnpack_offers() -> None:
    """The recipe's own first; of the bits that take the same space the most; whole groups only."""
    assert grids("android-xnnpack", "w4a8-g32", hidden=32, intermediate=192) == [
        "int4 g32", "int8 per_channel", "int4 per_channel", "int4 g64", "int4 g96", "int4 g192",
    ]  # fmt: skip
    assert grids("android-xnnpack", "w4a8", hidden=32, intermediate=172) == ["int4 per_channel", "int8 per_channel"]
    assert grids("android-xnnpack", "w8a8-static") == ["int8 per_channel"]


def test_what_onnx_runtime_offers() -> None:
    """Groups may be short there: of those that are one group of everything the smallest."""
    found = grids("linux-x64-ort", "w4a8-g32", hidden=32, intermediate=192)
    assert found[:2] == ["int4 g32", "int8 per_channel"]
    assert {"int4 g16", "int4 g128", "int4 g256", "int8 g16", "int2 g32"} <= set(found)
    small = grids("linux-x64-ort", "w4a16-g32", hidden=32, intermediate=64)
    assert "int4 g64" in small and "int4 g128" not in small and "int8 per_channel" not in small


def test_a_recipe_of_fewer_bits_stays_an_option() -> None:
    recipe = load_recipe("w4a8", ("weights.bits=3",))
    profile = load_target("android-xnnpack")
    record = assign(llama_config(), recipe, profile)["blocks.0.q_proj"]
    assert [r.spec.weight.bits for r in linear_options(record, profile)] == [3, 8, 4, 4]


def test_token_rows() -> None:
    target = load_target("android-xnnpack")
    assert row_options(Embedding(8), target, 64) == (Embedding(8), Embedding(4), Embedding(32), Embedding(4, 32))
    assert row_options(Embedding(4, 32), target, 64)[0] == Embedding(4, 32)
    assert Embedding(4, 32) not in row_options(Embedding(8), target, 48)
    only = msgspec.structs.replace(target, embedding_bits=(8,))
    assert row_options(Embedding(8), only, 64) == (Embedding(8),)


def test_overrides_and_patterns_keep_their_grid(make: Make) -> None:
    job = make()
    overridden = msgspec.structs.replace(
        job.recipe, override=(Override("blocks.0.*", bits=8, group=0), Override("*", activations="dynamic"))
    )
    records = assign(job.model.config, overridden, job.target)
    job = make(recipe_=overridden, records=records)
    found = find_options(job, ("lm_head", "embed_tokens", "*.up_proj"))
    assert {name for name, options in found.linears.items() if len(options) == 1} == {
        *(name for name in job.records if name.startswith("blocks.0.")), "blocks.1.up_proj", "lm_head",
    }  # fmt: skip
    assert found.rows == (job.recipe.embedding,)


def test_a_pattern_that_matches_nothing_is_refused(make: Make) -> None:
    with pytest.raises(InputError, match=r"nothing to keep \[--keep blocks\.9\.\*\].*embed_tokens"):
        find_options(make(), ("blocks.9.*",))


def test_nothing_to_choose_is_refused(make: Make) -> None:
    with pytest.raises(InputError, match="nothing to choose from"):
        find_options(make(), ("*",))
    with pytest.raises(InputError, match=r"w8a8-static.* on android-xnnpack"):
        find_options(make(recipe="w8a8-static+rtn"), ("lm_head", "embed_tokens"))
