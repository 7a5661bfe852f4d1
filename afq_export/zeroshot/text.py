"""The results of `evaluate` for a reader."""

from __future__ import annotations

from afq_export.report.tables import Table
from afq_export.spec.zeroshot import Score, ZeroShot

METRICS = {"acc": "accuracy", "acc_norm": "by length"}
"""lm-eval's name -> ours: log-likelihoods as they are, and divided by the number of characters."""


def text(result: ZeroShot) -> str:
    """A table of all tasks, and how to read it."""
    subject = result.subject
    what = f" ({subject.recipe}, {subject.runtime})" if subject.kind == "bundle" else " (float)"
    head = f"{subject.name}{what}, asked and scored by lm-eval {result.versions['lm-eval']}"
    lines = [head, "", table(result).text(), ""]
    if result.reference:
        lines.append(f"reference: {result.reference.name} ({result.reference.kind}), on the same documents; +a -b: "
                     "right here alone, right there alone")  # fmt: skip
    lines.append(
        "± is one standard error; `by length` divides a choice's log-likelihood by its characters (lm-eval: acc_norm)"
    )
    return "\n".join(lines)


def table(result: ZeroShot) -> Table:
    """A row per task and metric."""
    rows = []
    for task in result.tasks:
        for metric, score in task.scores.items():
            row = [
                task.task,
                METRICS.get(metric, metric),
                f"{task.documents.count} of {task.documents.in_file}",
                _share(score),
            ]
            if result.reference:
                there = task.difference[metric]
                row += [
                    _share(task.reference[metric]),
                    f"{there.value:+.2%} ± {there.stderr:.2%}",
                    f"+{there.gained} -{there.lost}",
                ]
            rows.append(tuple(row))
    header: tuple[str, ...] = ("task", "metric", "documents", result.subject.kind)
    header += ("reference", "difference", "changed") if result.reference else ()
    return Table(header, tuple(rows), frozenset(range(2, len(header))))


def _share(score: Score) -> str:
    return f"{score.value:.2%} ± {score.stderr:.2%}"
