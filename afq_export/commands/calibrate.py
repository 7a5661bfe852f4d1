"""`afq-export calibrate`."""

from __future__ import annotations

from afq_export.commands.options import Fresh, Json, takes_request
from afq_export.progress import silent
from afq_export.spec.request import Request
from afq_export.terminal import emit, note, progress


@takes_request
def command(request: Request, fresh: Fresh = False, as_json: Json = False) -> None:
    """Learn transforms, clipping and ranges, block by block, into the run folder.

    Several processes share the samples: `torchrun --nproc-per-node 2 -m afq_export calibrate ...`
    """
    from afq_export.commands import stages
    from afq_export.pipeline import run_calibrate

    with stages.start(request, fresh, lowers=False, together=True) as (job, folder), progress() as tick:
        calibration = run_calibrate(job, folder, tick if job.shards.writes else silent)
    if not job.shards.writes:
        return
    histories = [calibration.block(index).history for index in range(calibration.layers)]
    emit(stages.losses_table(calibration).text(), {"folder": str(folder.calibration), "blocks": histories}, as_json)
    note(f"next: {stages.next_stage('quantize')}")
