"""Validation of a bundle in its run folder: what the ladder needs, put together."""

from __future__ import annotations

import math

import msgspec

from afq_export.backends import backend
from afq_export.calibrate.result import Calibration
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.fold.online import online_costs
from afq_export.job import Job
from afq_export.load.model import expected_shapes
from afq_export.lower.bundle import Bundle
from afq_export.machine import peak_rss_mb
from afq_export.plan import program_size, sites
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.runfolder import RunFolder
from afq_export.spec.report import Artifact, Cost, Model, ValidationReport
from afq_export.validate.ladder import Subject, validate

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
    runtime = backend(bundle.backend)
    counted = program_size(job)
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
        folded=FoldedCheckpoint(job.source(calibration.rotation()), calibration.transforms()),
        coverage=runtime.coverage(bundle, job.target, checkpoint),
        cost=Cost(
            calibrate_s=folder.cost("calibrate", "seconds"),
            export_s=folder.cost("lower", "seconds"),
            peak_rss_mb=max(peak_rss_mb(), *(folder.cost(stage, "peak_rss_mb") or 0.0 for stage in STAGES)),
        ),
        artifact=Artifact(
            bytes=bundle.model_bytes, sha256=bundle.manifest.files[bundle.model.name], name=bundle.model.name
        ),
        size=msgspec.structs.replace(counted, rest=bundle.model_bytes - counted.total + counted.rest),
        sites=sites(job),
        online=online_costs(job.model.config, job.recipe.transforms),
        calibration=tuple(calibration.block(index).history for index in range(calibration.layers)),
        tuning=calibration.tuning(),
    )
    return validate(subject, runtime.runtime(bundle, job.target, checkpoint), progress=progress)
