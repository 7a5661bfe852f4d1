"""Several results of `afq-export evaluate --json` as one table, all against the first.

python examples/zero-shot/table.py float.json a.json b.json     a row per task and metric, a column per result
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from afq_export.report.tables import Table
from afq_export.spec.zeroshot import ZeroShot
from afq_export.zeroshot.evaluate import against, read_result, refuse_others


def table(first: ZeroShot, others: list[ZeroShot]) -> Table:
    """Accuracies of the first; of each other its accuracy, and the paired difference with its standard error."""
    asked = {task.task: task.documents for task in first.tasks}
    compared = []
    for other in others:
        refuse_others({task.task: task.documents for task in other.tasks}, asked)
        tasks = tuple(task for task in other.tasks if task.task in asked)
        compared.append({task.task: task for task in against(msgspec.structs.replace(other, tasks=tasks), first).tasks})
    rows = []
    for task in first.tasks:
        for metric, score in task.scores.items():
            cells = [f"{task.task}, {metric}, {task.documents.count}", f"{score.value:.1%} ± {score.stderr:.1%}"]
            for tasks in compared:
                ours = tasks[task.task]
                apart = ours.difference[metric]
                cells.append(f"{ours.scores[metric].value:.1%}: {apart.value:+.1%} ± {apart.stderr:.1%}")
            rows.append(tuple(cells))
    header = ("task, metric, documents", _name(first), *map(_name, others))
    return Table(header, tuple(rows), frozenset(range(1, len(header))))


def _name(result: ZeroShot) -> str:
    return result.subject.recipe or result.subject.kind


if __name__ == "__main__":
    results = [read_result(Path(name)) for name in sys.argv[1:]]
    print(table(results[0], results[1:]).markdown())
