"""Every choice becomes a recipe that reads back as that choice, of the size that `plan` counts."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from afq_export.errors import InputError, MissingToolError
from afq_export.job import Prepared
from afq_export.plan import program_size
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.sensitivity.analyse import answer, ask, recipe_text
from afq_export.sensitivity.options import ROWS, Options, find_options
from afq_export.sensitivity.report import text
from afq_export.sensitivity.suggest import best_choice, count_sizes, own_choice, prepared_with, suggested_recipe
from afq_export.spec.catalog import TARGETS, entries, load_recipe, load_target
from afq_export.spec.recipe import Override
from afq_export.spec.strict import to_toml

Make = Callable[..., Prepared]
CASES = [(entry.name, load_target(entry.name).default_recipe, "llama") for entry in entries(TARGETS)]
CASES += [("android-xnnpack", "w4a8", "opt"), ("linux-x64-ort", "w4a16-g32", "opt")]
CASES += [("linux-x64-ort", "w4a8-g32-all4+rotation", "llama"), ("android-xnnpack", "w8a8-static", "qwen2")]


def some_damages(options: Options, seed: int) -> dict[str, tuple[float, ...]]:
    draw = random.Random(seed)
    found = {name: tuple(draw.random() for _ in records) for name, records in options.linears.items()}
    return found | {ROWS: tuple(draw.random() for _ in options.rows)}


@pytest.mark.parametrize(("target", "recipe", "kind"), CASES)
def test_the_recipe_is_the_choice(target: str, recipe: str, kind: str, make: Make, tmp_path: Path) -> None:
    try:
        job = make(kind, target=target, recipe=recipe)
    except MissingToolError as error:
        pytest.skip(str(error))
    options = find_options(job)
    sizes = count_sizes(job, options)
    for seed in range(6):
        damages = some_damages(options, seed)
        budget = random.Random(seed).randint(sizes.least, sizes.most)
        best = best_choice(job, options, sizes, damages, budget)
        assert best.bytes <= budget
        path = tmp_path / f"{seed}.toml"
        path.write_text(to_toml(suggested_recipe(job, best, "suggested")))
        read = load_recipe(str(path))
        again = prepared_with(job, read)
        assert again.records == {name: msgspec.structs.replace(r, note="") for name, r in best.records.items()}
        assert (read.embedding, program_size(again).total) == (best.rows, best.bytes)
        assert (read.transforms, read.learning, read.rounding) == (
            job.recipe.transforms, job.recipe.learning, job.recipe.rounding,
        )  # fmt: skip


def test_borders_of_the_budget(make: Make) -> None:
    job = make()
    options = find_options(job)
    sizes, damages = count_sizes(job, options), some_damages(options, 0)
    assert best_choice(job, options, sizes, damages, sizes.least).bytes == sizes.least
    most = best_choice(job, options, sizes, damages, sizes.most)
    assert most.damage == pytest.approx(sum(map(min, damages.values())))
    own = own_choice(job, options, damages)
    assert own.bytes == program_size(job).total and own.records == job.records
    assert best_choice(job, options, sizes, damages, own.bytes).damage <= own.damage


def test_activations_of_an_override_stay(make: Make) -> None:
    """A mixed recipe: static inputs, but for down_proj; its linears and lm_head are still free to choose."""
    static = load_recipe("w8a8-static+rtn", ("samples.windows=2", "samples.length=16"))
    recipe = msgspec.structs.replace(static, override=(Override("blocks.*.down_proj", activations="dynamic"),))
    plain = make(recipe="w8a8-static+rtn")
    job = make(recipe="w8a8-static+rtn", recipe_=recipe, records=assign(plain.model.config, recipe, plain.target))
    found = answer(ask(job, count_sizes(job, find_options(job)).least), "mixed", silent)
    records = prepared_with(job, found.recipe).records
    free = {"blocks.0.down_proj", "blocks.1.down_proj", "lm_head"}
    assert {name for name, record in records.items() if record.kernel != "qs8-qc8w"} == free
    assert {records[name].spec.weight.bits for name in free} == {4}


def test_an_equal_size_costs_less_and_text_and_recipe_say_so(make: Make, tmp_path: Path) -> None:
    job = make()
    found = answer(ask(job, None), None, silent)
    assert found.budget == found.own.bytes == program_size(job).total
    assert found.suggested.bytes <= found.budget and found.suggested.damage <= found.own.damage
    assert found.least <= found.suggested.bytes <= found.most
    assert found.own.damage == pytest.approx(sum(linear.options[0].damage for linear in found.linears))
    assert found.suggested.damage == pytest.approx(sum(line.options[line.chosen].damage for line in found.linears))
    path = tmp_path / "suggested.toml"
    path.write_text(recipe_text(found))
    assert load_recipe(str(path)) == found.recipe
    for part in ("blocks.0.down_proj", "lm_head", "embed_tokens", found.recipe.name, "4g32"):
        assert part in text(found)


def test_too_small_a_budget_is_refused_before_anything_is_measured(make: Make) -> None:
    job = make()
    least = count_sizes(job, find_options(job)).least
    with pytest.raises(InputError, match=r"the budget is too small .*ask for \d+\.\d\d MB or more"):
        ask(job, least - 1)
    assert ask(job, least).budget == least
