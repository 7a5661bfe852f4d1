"""Linears that are alike as one row: which, how many, their grids, their kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from afq_export.quantize.checkpoint import LinearRecord
from afq_export.report.tables import Table
from afq_export.spec.strict import Data


class LayerGroup(Data):
    """`count` linears of `outputs` x `inputs`; `note` says why another grid was taken than the recipe's."""

    linears: str
    count: int
    outputs: int
    inputs: int
    weight: str
    activation: str
    kernel: str
    note: str = ""


def layer_groups(records: Mapping[str, LinearRecord]) -> tuple[LayerGroup, ...]:
    """All linears, grouped by role, shape, grids, kernel and note, in running order."""
    members: dict[tuple, list[LinearRecord]] = {}
    for record in records.values():
        spec = record.spec
        key = (spec.role, spec.outputs, spec.inputs, str(spec.weight), str(spec.activation), record.kernel, record.note)
        members.setdefault(key, []).append(record)
    blocks = 1 + max((r.spec.block for r in records.values() if r.spec.block is not None), default=-1)
    return tuple(
        LayerGroup(_pattern(found, blocks), len(found), outputs, inputs, weight, activation, kernel, note)
        for (_, outputs, inputs, weight, activation, kernel, note), found in members.items()
    )


def groups_text(groups: Sequence[LayerGroup]) -> str:
    """A row per group, and below the table the notes."""
    rows = tuple(
        (g.linears, str(g.count), f"{g.outputs} x {g.inputs}", g.weight, g.activation, g.kernel) for g in groups
    )
    table = Table(("linears", "count", "O x I", "weight", "activation", "kernel"), rows, frozenset({1})).text()
    notes = [f"{group.linears}: {group.note}" for group in groups if group.note]
    return "\n".join([table, *([""] if notes else []), *notes])


def _pattern(records: Sequence[LinearRecord], blocks: int) -> str:
    """`blocks.*.q_proj`, or `blocks.{0-3,7}.q_proj` when not all blocks are in it."""
    indices = [record.spec.block for record in records if record.spec.block is not None]
    if not indices:
        return records[0].spec.name
    where = "*" if len(indices) == blocks else str(indices[0]) if len(indices) == 1 else f"{{{_ranges(indices)}}}"
    return f"blocks.{where}.{records[0].spec.role}"


def _ranges(indices: Sequence[int]) -> str:
    """0, 1, 2, 5 -> `0-2,5`."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
