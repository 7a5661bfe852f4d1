"""What `sensitivity` says: as data, and as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from afq_export.job import Prepared
from afq_export.plan import row_bytes
from afq_export.quantize.assign import HEAD
from afq_export.report.tables import MISSING, Table, size_mb
from afq_export.sensitivity.measure import Damages
from afq_export.sensitivity.options import ROWS, Options, option_bytes
from afq_export.sensitivity.suggest import Choice, Sizes
from afq_export.spec.quant import QuantSpec
from afq_export.spec.recipe import Embedding, Recipe
from afq_export.spec.report import SCHEMA_VERSION
from afq_export.spec.strict import Data

WORST = 8
"""Linears that are listed by name."""
MEASURE = "nats per token, second order, round to nearest, each linear alone in the float model"


class OptionFacts(Data):
    """One grid of a linear or of the token rows: its kernel, bytes in the program, damage in nats per token."""

    grid: str
    kernel: str
    bytes: int
    damage: float


class LinearFacts(Data):
    """`options[0]` is the recipe's own grid, `chosen` the suggestion's."""

    name: str
    outputs: int
    inputs: int
    options: tuple[OptionFacts, ...]
    chosen: int


class Totals(Data):
    """Bytes of the program as `plan` counts them, and the sum of all damages."""

    bytes: int
    damage: float


class Sensitivity(Data, kw_only=True):
    """`sensitivity --json`. `recipe` is what `--out` writes; `budget` is in bytes, and so are `least` and `most`, the
    smallest and the largest program that the options make."""

    schema_version: int = SCHEMA_VERSION
    model: str
    target: str
    measure: str = MEASURE
    calibration: str
    calibration_sha256: str
    tokens: int
    seed: int
    linears: tuple[LinearFacts, ...]
    budget: int
    least: int
    most: int
    own: Totals
    suggested: Totals
    recipe: Recipe


def facts_of(
    job: Prepared,
    options: Options,
    sizes: Sizes,
    damages: Damages,
    budget: int,
    own: Choice,
    best: Choice,
    recipe: Recipe,
) -> Sensitivity:
    """Everything that was measured and chosen."""
    windows = job.calibration
    linears = []
    for name, records in options.linears.items():
        facts = tuple(
            OptionFacts(short(record.spec.weight), record.kernel, option_bytes(job, record), damage)
            for record, damage in zip(records, damages[name], strict=True)
        )
        spec = records[0].spec
        linears.append(LinearFacts(name, spec.outputs, spec.inputs, facts, records.index(best.records[name])))
    facts = tuple(
        OptionFacts(short_rows(rows), "", row_bytes(job, best.records[HEAD], rows), damage)
        for rows, damage in zip(options.rows, damages[ROWS], strict=True)
    )
    config = job.model.config
    linears.append(LinearFacts(ROWS, config.vocab, config.hidden, facts, options.rows.index(best.rows)))
    return Sensitivity(
        model=job.model.name,
        target=job.target.name,
        calibration=f"{len(windows.ids_NT)} windows of {windows.length} tokens of {windows.corpus}",
        calibration_sha256=windows.digest,
        tokens=windows.ids_NT.numel(),
        seed=job.request.seed,
        linears=tuple(linears),
        budget=budget,
        least=sizes.least,
        most=sizes.most,
        own=Totals(own.bytes, own.damage),
        suggested=Totals(best.bytes, best.damage),
        recipe=recipe,
    )


def short(weight: QuantSpec) -> str:
    """`4g32`, `8`."""
    return f"{weight.bits}g{weight.group}" if weight.group else str(weight.bits)


def short_rows(rows: Embedding) -> str:
    """`4g32`, `8`, `float`."""
    return "float" if rows.bits == 32 else f"{rows.bits}g{rows.group}" if rows.group else str(rows.bits)


def text(found: Sensitivity) -> str:
    """Tables for a reader: by grid, by linear, what stands out, and what is suggested."""
    own, best = found.own, found.suggested
    parts = [
        f"{found.model} on {found.target}: {found.measure}; {found.calibration}",
        "By grid (4g32: 4 bits, a scale per 32 inputs; 4: a scale per row), sum over the blocks, 1e-3 nats a token:",
        by_grid(found).text(),
        "The recipe's own grids, 1e-3 nats a token:",
        by_block(found, lambda linear: _milli(linear.options[0].damage)).text(),
        "What costs most for what it takes:",
        worst(found).text(),
        f"Suggested, {size_mb(found.budget)} at most:",
        by_block(found, lambda linear: linear.options[linear.chosen].grid).text(),
        Table(
            ("recipe", "size", "nats a token", "perplexity"),
            tuple(
                (name, size_mb(t.bytes), f"{t.damage:.4f}", f"{math.expm1(min(t.damage, 50)):+.1%}")
                for name, t in (("as given", own), (found.recipe.name, best))
            ),
            frozenset({1, 2, 3}),
        ).text(),
        "The last column is what the sum would make of the float model's perplexity with plain rounding: it orders "
        "recipes; methods that learn do better.",
    ]
    return "\n\n".join(parts)


def by_grid(found: Sensitivity) -> Table:
    """Rows: grids by bytes. Columns: roles, summed over blocks; a dash where not every block has the grid."""
    roles = _roles(found)
    order: dict[str, int] = {}
    for linear in found.linears:
        for option in linear.options:
            order[option.grid] = max(order.get(option.grid, 0), option.bytes * 1000 // (linear.outputs * linear.inputs))
    rows = []
    for grid in sorted(order, key=lambda grid: (order[grid], grid)):
        cells = []
        for members in roles.values():
            values = [next((o.damage for o in m.options if o.grid == grid), None) for m in members]
            cells.append(MISSING if None in values else _milli(sum(v for v in values if v is not None)))
        rows.append((grid, *cells))
    return Table(("grid", *roles), tuple(rows), frozenset(range(1, len(roles) + 1)))


def by_block(found: Sensitivity, cell: Callable[[LinearFacts], str]) -> Table:
    """A row per block, a column per linear; lm_head and the token rows below."""
    roles = {role: members for role, members in _roles(found).items() if role not in (HEAD, ROWS)}
    rows = [(str(i), *(cell(members[i]) for members in roles.values())) for i in range(len(next(iter(roles.values()))))]
    outer = [(linear.name, cell(linear), *[""] * (len(roles) - 1)) for linear in found.linears[-2:]]
    return Table(("block", *roles), (*rows, *outer), frozenset(range(1, len(roles) + 1)))


def worst(found: Sensitivity) -> Table:
    """Linears by the damage of their own grid, and what the grid with the least damage would save and take."""
    total = found.own.damage or 1.0
    rows = []
    for linear in sorted(found.linears, key=lambda linear: -linear.options[0].damage)[:WORST]:
        own, best = linear.options[0], min(linear.options, key=lambda option: option.damage)
        more = f"{best.grid}: {_milli(best.damage)} for {(best.bytes - own.bytes) / 1e3:+.0f} kB"
        rows.append((linear.name, own.grid, _milli(own.damage), f"{own.damage / total:.1%}", more))
    return Table(("linear", "grid", "1e-3 nats", "of all", "at best"), tuple(rows), frozenset({2, 3}))


def _roles(found: Sensitivity) -> Mapping[str, list[LinearFacts]]:
    roles: dict[str, list[LinearFacts]] = {}
    for linear in found.linears:
        roles.setdefault(linear.name.rsplit(".", 1)[-1], []).append(linear)
    return roles


def _milli(damage: float) -> str:
    return f"{damage * 1e3:.3g}"
