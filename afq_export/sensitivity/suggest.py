"""From damages to a recipe: the options that cost least within a number of bytes, written as a scheme and overrides."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import msgspec

from afq_export.backends import backend
from afq_export.errors import InputError
from afq_export.job import Prepared
from afq_export.plan import program_size, row_bytes
from afq_export.quantize.assign import HEAD, assign
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.sensitivity.allocate import Item, allocate
from afq_export.sensitivity.measure import Damages
from afq_export.sensitivity.options import ROWS, Options, option_bytes
from afq_export.spec.recipe import Embedding, Override, Recipe, Weights
from afq_export.spec.strict import convert
from afq_export.spec.target import activation_mode


@dataclasses.dataclass(frozen=True)
class Choice:
    """One option of everything: records by name, the token rows, the program's bytes as `plan` counts them, nats."""

    records: dict[str, LinearRecord]
    rows: Embedding
    bytes: int
    damage: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of what is chosen, `blocks` by name; `outer` of lm_head and the token rows together, which may be one
    tensor, by the indices in `pairs`; `fixed` of everything else."""

    blocks: dict[str, tuple[int, ...]]
    pairs: tuple[tuple[int, int], ...]
    outer: tuple[int, ...]
    fixed: int

    @property
    def least(self) -> int:
        """Bytes of the smallest program."""
        return self.fixed + sum(map(min, self.blocks.values())) + min(self.outer)

    @property
    def most(self) -> int:
        """Bytes of the largest program."""
        return self.fixed + sum(map(max, self.blocks.values())) + max(self.outer)


def count_sizes(job: Prepared, options: Options) -> Sizes:
    """The bytes of all options."""
    blocks = {
        name: tuple(option_bytes(job, record) for record in records)
        for name, records in options.linears.items()
        if name != HEAD
    }
    heads, rows = options.linears[HEAD], options.rows
    pairs = tuple((head, row) for head in range(len(heads)) for row in range(len(rows)))
    outer = tuple(option_bytes(job, heads[head]) + row_bytes(job, heads[head], rows[row]) for head, row in pairs)
    variable = sum(sizes[0] for sizes in blocks.values()) + outer[0]
    return Sizes(blocks, pairs, outer, program_size(job).total - variable)


def refuse_budget(job: Prepared, sizes: Sizes, budget: int) -> None:
    """Raises InputError when nothing is so small."""
    if budget < sizes.least:
        least = f"{-(-sizes.least // 10_000) / 100:.2f} MB"
        raise InputError(
            "the budget is too small",
            where=f"--budget-mb {budget / 1e6:g}",
            why=f"with the smallest grids of {job.target.name} the program is {least}",
            do=f"ask for {least} or more",
        )


def own_choice(job: Prepared, options: Options, damages: Damages) -> Choice:
    """The recipe as it is."""
    return _choice(job, options, damages, dict.fromkeys(damages, 0))


def best_choice(job: Prepared, options: Options, sizes: Sizes, damages: Damages, budget: int) -> Choice:
    """The least sum of damages in a program of at most `budget` bytes."""
    items = [Item(found, damages[name]) for name, found in sizes.blocks.items()]
    items.append(Item(sizes.outer, tuple(damages[HEAD][head] + damages[ROWS][row] for head, row in sizes.pairs)))
    *chosen, pair = allocate(items, budget - sizes.fixed)
    indices = dict(zip(sizes.blocks, chosen, strict=True)) | dict(zip((HEAD, ROWS), sizes.pairs[pair], strict=True))
    return _choice(job, options, damages, indices)


def suggested_recipe(job: Prepared, choice: Choice, name: str) -> Recipe:
    """The job's recipe with the grids of `choice`; no other grid is taken for them on any target.

    The grid that most linears of the blocks have is the scheme's, the one that most linears of a role have is an
    override of the role, and one more names each linear that differs.
    """
    blocks = {name: _override(record, job.recipe) for name, record in choice.records.items() if name != HEAD}
    weights = [choice.records[name].spec.weight for name in blocks]
    (bits, group), _ = Counter((weight.bits, weight.group) for weight in weights).most_common(1)[0]
    usual = (bits, group, None)
    overrides: list[Override] = []
    for role in dict.fromkeys(choice.records[name].spec.role for name in blocks):
        members = {name: override for name, override in blocks.items() if choice.records[name].spec.role == role}
        common, _ = Counter(_grid(override) for override in members.values()).most_common(1)[0]
        if common != usual:
            overrides.append(Override(f"blocks.*.{role}", *common))
        overrides += [override for override in members.values() if _grid(override) != common]
    recipe, head = job.recipe, choice.records[HEAD].spec.weight
    if _override(choice.records[HEAD], recipe).activations is not None:
        overrides.append(_override(choice.records[HEAD], recipe))
    return msgspec.structs.replace(
        recipe,
        name=name,
        description="; ".join(filter(None, (recipe.description, f"grids by sensitivity for {job.target.name}"))),
        weights=Weights(bits, group, recipe.weights.symmetric),
        head=Weights(head.bits, head.group, recipe.head.symmetric),
        embedding=choice.rows,
        override=tuple(overrides),
        fallback="refuse",
    )


def prepared_with(job: Prepared, recipe: Recipe) -> Prepared:
    """The job with another recipe, checked like any. Raises InputError."""
    records = assign(job.model.config, recipe, job.target)
    backend(job.target.backend).refuse(job.target, records)
    return dataclasses.replace(job, recipe=recipe, records=records)


def _choice(job: Prepared, options: Options, damages: Damages, indices: Mapping[str, int]) -> Choice:
    records = {name: found[indices[name]] for name, found in options.linears.items()}
    rows = options.rows[indices[ROWS]]
    recipe = msgspec.structs.replace(job.recipe, embedding=rows)
    size = program_size(dataclasses.replace(job, recipe=recipe, records=records))
    return Choice(records, rows, size.total, sum(damages[name][index] for name, index in indices.items()))


def _override(record: LinearRecord, recipe: Recipe) -> Override:
    """The linear's own: its grid, and its activations where they are not what the recipe gives it anyway."""
    spec, usual = record.spec, recipe.activations.mode
    if spec.name == HEAD and usual != "none":
        usual = "dynamic"
    mode = activation_mode(spec)
    return convert(
        {"pattern": spec.name, "bits": spec.weight.bits, "group": spec.weight.group}
        | ({} if mode == usual else {"activations": mode}),
        Override,
        spec.name,
    )


def _grid(override: Override) -> tuple:
    return override.bits, override.group, override.activations
