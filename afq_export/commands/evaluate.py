"""`afq-export evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afq_export.commands.options import Json, Threads
from afq_export.terminal import emit, progress


def command(
    model: Annotated[
        str, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle (or the run folder around it), or a float model.")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="arc_easy, arc_challenge, piqa, hellaswag, winogrande, openbookqa, copa: some, with commas between.",
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder with the tasks' files (arc_easy.jsonl, ...).")],
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N documents of each file (default: all).")
    ] = None,
    float_model: Annotated[
        str | None,
        typer.Option("--float", metavar="DIR|ID|GGUF", help="Ask the float model the same, and show the difference."),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Show the difference from what an earlier --json printed.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Zero-shot accuracy through the real runtime, asked and scored by lm-eval, with data from local files.

    A difference is taken document by document, so its error is smaller than that of either accuracy.
    """
    from afq_export.errors import InputError
    from afq_export.machine import default_threads, settle
    from afq_export.zeroshot.evaluate import against, evaluate, open_subject, read_result, refuse_others
    from afq_export.zeroshot.library import require_lm_eval
    from afq_export.zeroshot.sources import open_set
    from afq_export.zeroshot.text import text

    require_lm_eval()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("no task is named", where="--tasks", do="arc_easy, for one")
    if len(set(names)) < len(names):
        raise InputError("a task is named twice", where=f"--tasks {tasks}")
    if float_model and compare:
        raise InputError("one comparison at a time", why="both --float and --compare are given")
    count = threads or default_threads()
    settle(count)
    sets = [open_set(name, data, limit) for name in names]
    reference = read_result(compare) if compare else None
    subject = open_subject(model, sets)
    other = open_subject(float_model, sets) if float_model else None
    if reference or other:
        there = {task.task: task.documents for task in reference.tasks} if reference else other.documents
        refuse_others(there, subject.documents)
    with progress() as tick:
        result = evaluate(subject, limit, count, tick)
        reference = evaluate(other, limit, count, tick) if other else reference
    result = against(result, reference) if reference else result
    emit(text(result), result, as_json)
