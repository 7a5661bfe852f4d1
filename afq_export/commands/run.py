"""`afq-export run`."""

from __future__ import annotations

import typer

from afq_export.commands.options import Fresh, Json, takes_request
from afq_export.spec.request import Request
from afq_export.terminal import emit, progress


@takes_request
def command(request: Request, fresh: Fresh = False, as_json: Json = False) -> None:
    """From a model to a verified bundle: calibrate, quantize, lower, validate.

    With no option at all it takes the embedded demo model and corpora. Run again, it continues where it stopped.
    Exit code 1 when a check failed.
    """
    from afq_export import pipeline
    from afq_export.commands.stages import start
    from afq_export.report.summary import summary

    with start(request, fresh) as (job, folder), progress() as tick:
        outcome = pipeline.run(job, folder, tick)
    emit(summary(outcome.report, outcome.bundle.folder), outcome.report, as_json)
    raise typer.Exit(1 if outcome.report.verdict == "fail" else 0)
