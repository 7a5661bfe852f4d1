"""Validation of a bundle in its run folder: what the ladder needs, put together."""

from __future__ import annotations

import math

from afq_export.calibrate.result import Calibration
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.job import Job
from afq_export.load.model import expected_shapes
from afq_export.lower.bundle import Bundle
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.runfolder import RunFolder, peak_rss_mb
from afq_export.spec.report import Artifact, Cost, Coverage, Model, ValidationReport
from afq_export.validate.ladder import Runtime, Subject, validate

STAGES = ("calibrate", "quantize", "lower")
"""Stages before this one, as run.json names them."""


def validate_bundle(
    job: Job,
    folder: RunFolder,
    checkpoint: QuantizedCheckpoint,
    calibration: Calibration,
    bundle: Bundle,
    progress: Progress,
) -> ValidationReport:
    """The ladder on the exported file of `bundle`, on the job's evaluation windows."""
    parameters = sum(math.prod(shape) for shape in expected_shapes(job.model.config).values())
    subject = Subject(
        checkpoint=checkpoint,
        target=job.target,
        windows=job.evaluation,
        model=Model(
            name=bundle.manifest.model.name,
            digest=job.model.digest,
            type=job.model.config.model_type,
            parameters=parameters,
        ),
        recipe=job.recipe.name,
        original=job.model,
        folded=FoldedCheckpoint(job.model, calibration.transforms()),
        coverage=read_coverage(checkpoint, bundle),
        cost=Cost(
            calibrate_s=folder.cost("calibrate", "seconds"),
            export_s=folder.cost("lower", "seconds"),
            peak_rss_mb=max(peak_rss_mb(), *(folder.cost(stage, "peak_rss_mb") or 0.0 for stage in STAGES)),
        ),
        artifact=Artifact(
            bytes=bundle.model.stat().st_size, sha256=bundle.manifest.files[bundle.model.name], name=bundle.model.name
        ),
        calibration=tuple(calibration.block(index).history for index in range(calibration.layers)),
    )
    return validate(subject, executorch_runtime(bundle), progress=progress)


def executorch_runtime(bundle: Bundle) -> Runtime:
    """ExecuTorch's runtime for the bundle's program, imported when it is first asked for."""

    def open_session():
        from afq_export.runtime.executorch import ExecutorchSession

        return ExecutorchSession(bundle.model)

    def probe(linears, inputs):
        from afq_export.lower.executorch.probe import run_linears

        return run_linears(linears, inputs)

    def float_parts(checkpoint, session):
        from afq_export.lower.executorch.float_parts import ExecutorchFloatParts

        return ExecutorchFloatParts(session.context, session.prefill)

    return Runtime(open_session, probe, float_parts)


def read_coverage(checkpoint: QuantizedCheckpoint, bundle: Bundle) -> Coverage:
    """What the file holds, read back from it; raises VerdictError when it is not the checkpoint's program."""
    from afq_export.lower.executorch.coverage import coverage_of
    from afq_export.lower.executorch.program import verify_program
    from afq_export.lower.executorch.readback import read_program

    content = read_program(bundle.model.read_bytes())
    verify_program(checkpoint, content)
    return coverage_of(checkpoint, content)
