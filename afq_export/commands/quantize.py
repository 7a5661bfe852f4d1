"""`afq-export quantize`."""

from __future__ import annotations

from afq_export.commands.options import Fresh, Json, takes_request
from afq_export.spec.request import Request
from afq_export.terminal import emit, note, progress


@takes_request
def command(request: Request, fresh: Fresh = False, as_json: Json = False) -> None:
    """Fold what was learned and write integers, scales and zero points; calibrates first if that is not done."""
    from afq_export.commands import describe, stages

    with stages.start(request, fresh, lowers=False) as (job, folder), progress() as tick:
        _, checkpoint = stages.quantized(job, folder, tick)
    facts = describe.quantized(checkpoint)
    emit(facts.text(), facts, as_json)
    note(f"next: {stages.next_stage('lower')}")
