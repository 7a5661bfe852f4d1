"""What `run` and the stages alone have in common. Imports the pipeline: for use inside command bodies."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator

from afq_export import pipeline
from afq_export.calibrate.result import Calibration
from afq_export.calibrate.shards import connected
from afq_export.errors import InputError
from afq_export.job import Job, Prepared, resolve
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.report.tables import Table, number
from afq_export.runfolder import RunFolder
from afq_export.spec.request import Request
from afq_export.terminal import note

STATUS = {
    "compiles": "its programs are made and read back here, not run; no figure will be the exported file's",
    "untested": "written from the vendor's documentation; nothing of it was seen to work",
}


@contextlib.contextmanager
def start(
    request: Request, fresh: bool, *, lowers: bool = True, together: bool = False
) -> Iterator[tuple[Job, RunFolder]]:
    """The job of `request` and its run folder; once nothing is refused, says what was taken by default.

    Without `lowers`, what only lowering needs may be missing: it is said and not refused. `together`: several processes
    may do it.
    """
    job = resolve(request, lowers=lowers)
    if job.shards.world > 1 and not together:
        do = f"end `calibrate` with them, then run this alone with --shards {job.shards.count}"
        raise InputError("several processes only calibrate", why=f"there are {job.shards.world}", do=do)
    with connected(job.shards), pipeline.open_folder(job, fresh=fresh) as folder:
        if job.shards.writes:
            say_defaults(job)
            say_status(job)
        yield job, folder


def say_defaults(job: Prepared) -> None:
    """Says what was taken because nothing was said."""
    if job.defaults:
        note(f"taken by default: {'; '.join(job.defaults)}")


def say_status(job: Job) -> None:
    """Says, before any work, when nothing here can show that the target's programs run."""
    if job.target.status in STATUS:
        note(f"{job.target.name} is {job.target.status!r}: {STATUS[job.target.status]}")
    if job.missing:
        note(f"lowering cannot follow on this machine: {job.missing}")


def quantized(job: Job, folder: RunFolder, progress: Progress) -> tuple[Calibration, QuantizedCheckpoint]:
    """Everything up to the quantized checkpoint; stages whose result stands are skipped."""
    calibration = pipeline.run_calibrate(job, folder, progress)
    return calibration, pipeline.run_quantize(job, folder, calibration, progress)


def next_stage(name: str) -> str:
    """This command line with another stage's name."""
    here = sys.argv[1] if len(sys.argv) > 1 else ""
    rest = [argument for argument in sys.argv[2:] if argument not in ("--fresh", "--json", "--debug")]
    options = rest if here in ("calibrate", "quantize", "lower") else []
    return shlex.join(["afq-export", name, *options])


def losses_table(calibration: Calibration) -> Table:
    """Relative block losses: rounded only, at the start values, as kept."""
    rows = []
    for index in range(calibration.layers):
        history = calibration.block(index).history
        losses = (history.rounded_loss, history.start_loss, history.final_loss)
        rows.append((str(index), *(number(loss, ".2e") for loss in losses), "; ".join(history.events)))
    header = ("block", "round to nearest", "start", "learned", "events")
    return Table(header, tuple(rows), frozenset(range(4)))
