"""The grids that a target's kernels offer for every linear and for the token rows, and their bytes."""

from __future__ import annotations

import dataclasses
import fnmatch

import msgspec

from afq_export.backends import backend
from afq_export.errors import InputError
from afq_export.job import Prepared
from afq_export.plan import linear_bytes
from afq_export.quantize.assign import record_for
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.spec.quant import Granularity, QuantSpec
from afq_export.spec.recipe import Embedding
from afq_export.spec.target import Kernel, TargetProfile, Yes, activation_mode

ROWS = "embed_tokens"
"""The token rows' name among the linears."""
GROUPS = (16, 32, 64, 96, 128, 192, 256)
"""Groups that are tried where the kernel does not list its own."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be chosen: `linears` by name in running order, lm_head last, and `rows`. The recipe's own grid is the
    first of each, and the only one of what keeps it."""

    linears: dict[str, tuple[LinearRecord, ...]]
    rows: tuple[Embedding, ...]


def find_options(job: Prepared, keep: tuple[str, ...] = ()) -> Options:
    """All grids on the job's target, with the recipe's activations.

    A linear whose grid an override of the recipe names, or whose name matches one of `keep`, keeps it. Raises
    InputError when a pattern matches nothing, or nothing has a choice.
    """
    names = [*job.records, ROWS]
    for pattern in keep:
        if not fnmatch.filter(names, pattern):
            raise InputError(
                "nothing to keep", where=f"--keep {pattern}", do=f"names are {names[0]} ... {', '.join(names[-3:])}"
            )
    overridden = [o.pattern for o in job.recipe.override if o.bits is not None or o.group is not None]

    def kept(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*keep, *overridden))

    linears = {
        name: (record,) if kept(name) else linear_options(record, job.target) for name, record in job.records.items()
    }
    own = job.recipe.embedding
    found = Options(linears, (own,) if kept(ROWS) else row_options(own, job.target, job.model.config.hidden))
    if all(len(choice) == 1 for choice in (*found.linears.values(), found.rows)):
        raise InputError(
            "nothing to choose from",
            where=f"{job.recipe.name} on {job.target.name}",
            why="no linear has a kernel for another grid, or all keep theirs",
            do="take another recipe or target (`afq-export targets show`), or fewer --keep",
        )
    return found


def linear_options(record: LinearRecord, target: TargetProfile) -> tuple[LinearRecord, ...]:
    """The record itself, then every other grid that a kernel of the target runs with the same kind of activations.

    Of the bits that a kernel stores in the same space the most are taken: fewer save nothing.
    """
    spec = record.spec
    found = {_key(spec.weight, spec.inputs): record}
    for kernel in target.kernels:
        if kernel.activation != activation_mode(spec):
            continue
        for weight in _grids(kernel, spec.weight):
            asked = msgspec.structs.replace(spec, weight=weight)
            answer = target.supports(asked)
            if isinstance(answer, Yes) and answer.kernel == kernel:
                found.setdefault(_key(weight, spec.inputs), record_for(asked, kernel))
    return tuple(found.values())


def row_options(own: Embedding, target: TargetProfile, hidden: int) -> tuple[Embedding, ...]:
    """The recipe's rows, then what the target has: one scale per row, in 4 bits also one per 32 columns, or float."""
    every = (Embedding(8), Embedding(4), Embedding(32), Embedding(4, 32))
    found = [
        rows
        for rows in every
        if rows.bits in target.embedding_bits and hidden % (rows.group or (2 if rows.bits == 4 else 1)) == 0
    ]
    return (own, *(embedding for embedding in found if embedding != own))


def option_bytes(job: Prepared, record: LinearRecord) -> int:
    """What a linear takes in the program, with what the format adds for it."""
    runtime, config = backend(job.target.backend), job.model.config
    added = runtime.overhead(config, {record.spec.name: record}, job.target) - runtime.overhead(config, {}, job.target)
    return linear_bytes(record, job.target) + added


def _grids(kernel: Kernel, own: QuantSpec) -> list[QuantSpec]:
    bits = max(kernel.weight_bits)
    if kernel.granularity is not Granularity.PER_GROUP:
        return [QuantSpec(bits, kernel.granularity, own.symmetric)]
    groups = sorted({*(kernel.groups or GROUPS), *([own.group] if own.group else [])})
    return [QuantSpec(bits, kernel.granularity, own.symmetric, group) for group in groups]


def _key(weight: QuantSpec, inputs: int) -> tuple[int, Granularity, int]:
    """Grids with as many scales are one choice: of groups that are cut short, the smallest."""
    return weight.bits, weight.granularity, weight.groups(inputs)
