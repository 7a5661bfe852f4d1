"""The whole of `sensitivity`: options, damages, the choice within the budget, its recipe."""

from __future__ import annotations

import dataclasses

from afq_export.job import Prepared
from afq_export.plan import program_size
from afq_export.progress import Progress
from afq_export.sensitivity.measure import measure
from afq_export.sensitivity.options import Options, find_options
from afq_export.sensitivity.report import Sensitivity, facts_of
from afq_export.sensitivity.suggest import (
    Sizes,
    best_choice,
    count_sizes,
    own_choice,
    prepared_with,
    refuse_budget,
    suggested_recipe,
)
from afq_export.spec.strict import to_toml


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be chosen: `budget` is the most bytes of the program."""

    job: Prepared
    options: Options
    sizes: Sizes
    budget: int


def ask(job: Prepared, budget: int | None, keep: tuple[str, ...] = ()) -> Question:
    """The question of `job`, with as many bytes as its recipe takes when `budget` is None.

    Raises InputError when there is nothing to choose, or the budget is too small.
    """
    options = find_options(job, keep)
    sizes = count_sizes(job, options)
    limit = program_size(job).total if budget is None else budget
    refuse_budget(job, sizes, limit)
    return Question(job, options, sizes, limit)


def answer(question: Question, name: str | None, progress: Progress) -> Sensitivity:
    """Measures, and suggests a recipe called `name`; None: after the recipe and the budget."""
    job, options, sizes, budget = question.job, question.options, question.sizes, question.budget
    damages = measure(job, options, progress)
    best = best_choice(job, options, sizes, damages, budget)
    recipe = suggested_recipe(job, best, name or f"{job.recipe.name}-{budget / 1e6:.0f}mb")
    found = program_size(prepared_with(job, recipe)).total
    if found != best.bytes:
        raise RuntimeError(f"the suggested recipe has {found} bytes, the choice {best.bytes}")
    return facts_of(job, options, sizes, damages, budget, own_choice(job, options, damages), best, recipe)


def recipe_text(found: Sensitivity) -> str:
    """The suggested recipe as a TOML file, every default written out."""
    return (
        f"# Suggested by `afq-export sensitivity` for {found.target}, at most {found.budget / 1e6:.2f} MB.\n"
        f"# Predicted: {found.suggested.bytes} bytes, {found.suggested.damage:.5f} nats a token; the recipe that it "
        f"started from: {found.own.bytes} bytes, {found.own.damage:.5f}.\n\n{to_toml(found.recipe)}"
    )
