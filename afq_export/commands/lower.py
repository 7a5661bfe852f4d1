"""`afq-export lower`."""

from __future__ import annotations

import shlex

from afq_export.commands.options import Fresh, Json, takes_request
from afq_export.spec.request import Request
from afq_export.terminal import emit, note, progress


@takes_request
def command(request: Request, fresh: Fresh = False, as_json: Json = False) -> None:
    """Write the target's program and the rest of the bundle; calibrates and quantizes first if that is not done."""
    from afq_export.commands import describe, stages
    from afq_export.pipeline import run_lower

    with stages.start(request, fresh) as (job, folder), progress() as tick:
        _, checkpoint = stages.quantized(job, folder, tick)
        bundle = run_lower(job, folder, checkpoint, tick)
    facts = describe.bundle(bundle)
    emit(facts.text(), facts, as_json)
    note(f"next: afq-export validate {shlex.quote(str(folder.path))}")
