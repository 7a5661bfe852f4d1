"""Validation of a finished run, long after it: the job is resolved again from what run.json holds."""

from __future__ import annotations

import dataclasses

from afq_export.calibrate.result import Calibration
from afq_export.device.names import DeviceRequest
from afq_export.errors import InputError
from afq_export.job import Job, resolve
from afq_export.lower.bundle import open_bundle
from afq_export.machine import settle
from afq_export.pipeline import run_validate
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import open_checkpoint
from afq_export.runfolder import RunFolder, held, refuse_difference
from afq_export.spec.report import ValidationReport
from afq_export.spec.request import recorded_request
from afq_export.validate.devices import check_bundle, few_windows, open_devices, ready_program


def revalidate(
    folder: RunFolder, progress: Progress, on: DeviceRequest | None = None, **changes: object
) -> ValidationReport:
    """The ladder on the bundle in `folder`; `changes` are fields of Request that replace those of the run.

    `on` names devices that the exported file is to run on as well. Raises MissingToolError when one is not set up, and
    InputError when a run works in the folder, a file of the bundle was changed, or model, recipe, target or calibration
    text are no longer what the run was made from. Versions and threads may differ: whether the bundle still holds is
    the question.
    """
    devices = open_devices(on.devices) if on else ()
    data = folder.read()
    given = {key: value for key, value in changes.items() if value is not None}
    request = dataclasses.replace(recorded_request(data.get("request", {})), **given)
    with held(folder.path):  # from the first hash on, so that what is checked is what is measured
        bundle = open_bundle(folder.bundle, reports=False)
        if on:
            ready_program(bundle, on, devices)
        job = resolve(dataclasses.replace(request, out=str(folder.path)))
        settle(job.threads)
        _refuse_other_inputs(data.get("fingerprint", {}), job, folder)
        checkpoint = open_checkpoint(folder.quantized)
        calibration = Calibration(folder.calibration, job.model.config.layers)
        few_NT = few_windows(job.evaluation.ids_NT, on.windows, on.window) if on else job.evaluation.ids_NT[:0]

        def with_devices(report: ValidationReport) -> ValidationReport:
            if not on:
                return report
            found = check_bundle(bundle, job.target, checkpoint, on, devices, few_NT, progress)
            return found.added_to(report)

        return run_validate(job, folder, checkpoint, calibration, bundle, progress, with_devices)


def _refuse_other_inputs(recorded: dict[str, str], job: Job, folder: RunFolder) -> None:
    def inputs(facts: dict[str, str]) -> dict[str, str]:
        return {key: value for key, value in facts.items() if key != "threads" and not key.startswith("version.")}

    try:
        refuse_difference(inputs(recorded), inputs(job.fingerprint()), folder.path)
    except InputError as error:
        raise InputError(
            "the bundle was made from other inputs", where=error.where, why=error.why, do="run it again"
        ) from error
