"""The whole program on one page: load, calibrate, fold, quantize, lower, validate, report.

    resolve    Request                                     -> Job                  (everything refused early)
    calibrate  FloatCheckpoint, Recipe, grids, Windows     -> Calibration
    fold       FloatCheckpoint, Calibration                -> FoldedCheckpoint
    quantize   FoldedCheckpoint, Calibration, grids        -> QuantizedCheckpoint
    lower      QuantizedCheckpoint, TargetProfile          -> Bundle
    validate   QuantizedCheckpoint, Bundle, Windows        -> ValidationReport
    report     ValidationReport                            -> report.json, report.md, README.md

Each stage writes its result to the run folder; a stage whose result stands is skipped, and a folder that belongs to
other inputs is refused (runfolder.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from afq_export.calibrate.activations import choose_store
from afq_export.calibrate.calibrate import calibrate
from afq_export.calibrate.end_to_end import tune
from afq_export.calibrate.result import (
    Calibration,
    block_path,
    outer_path,
    read_rotation,
    rotation_path,
    tuned_path,
    write_rotation,
    write_tuned,
)
from afq_export.calibrate.rotation import learn_rotation
from afq_export.errors import InputError
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.fold.online import with_online
from afq_export.fold.rotation import Rotation
from afq_export.job import Job, activations, versions
from afq_export.load.tokenizer import load_folder_tokenizer, refuse_other_tokenizer
from afq_export.lower.bundle import REPORTS, Bundle, open_bundle, seal
from afq_export.lower.lower import lower
from afq_export.machine import settle
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint, open_checkpoint
from afq_export.quantize.quantize import quantize
from afq_export.quantize.tensors import tensor_bits
from afq_export.report.write import write_reports
from afq_export.runfolder import RunFolder, held, prepare
from afq_export.spec.report import ValidationReport
from afq_export.validate.run import validate_bundle


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run ends with."""

    report: ValidationReport
    bundle: Bundle
    folder: RunFolder


def run(job: Job, folder: RunFolder, progress: Progress) -> Outcome:
    """All stages in order. Raises AfqError; a failed verdict is in the report, not an exception."""
    calibration = run_calibrate(job, folder, progress)
    checkpoint = run_quantize(job, folder, calibration, progress)
    bundle = run_lower(job, folder, checkpoint, progress)
    report = run_validate(job, folder, checkpoint, calibration, bundle, progress)
    return Outcome(report, open_bundle(folder.bundle), folder)


@contextlib.contextmanager
def open_folder(job: Job, *, fresh: bool = False) -> Iterator[RunFolder]:
    """The job's run folder, for this process alone, and torch set as its fingerprint says.

    Of several processes that calibrate together the first has it and the others wait for it. Raises InputError when the
    folder belongs to other inputs, is in use or cannot be written.
    """
    settle(job.threads)
    if not job.shards.writes:
        job.shards.wait()
        yield RunFolder(job.out)
        return
    request = dataclasses.asdict(job.request) | {"model_name": job.model.name, "cwd": str(Path.cwd())}
    with held(job.out):
        folder = prepare(job.out, job.fingerprint(), request, fresh)
        job.shards.wait()
        yield folder


def run_calibrate(job: Job, folder: RunFolder, progress: Progress) -> Calibration:
    """The calibrate stage: block by block, then end to end where the recipe says so. Goes on at what has no result."""
    place, last = folder.calibration, job.model.config.layers - 1
    bits = tensor_bits(job.recipe.activations.bits, job.target) if job.target.static_graph else None
    calibration, recipe, seed = Calibration(place, last + 1), job.recipe, job.request.seed
    blocks_done = (outer_path(place) if bits else block_path(place, last)).exists()
    if blocks_done and (tuned_path(place).exists() or not recipe.end_to_end.steps):
        return calibration
    with folder.stage("calibrate") if job.shards.writes else contextlib.nullcontext():
        source = job.source(_learned_rotation(job, folder, progress))
        store = choose_store(activations(job), place, torch.device(job.device))
        if not blocks_done:
            calibrate(source, recipe, job.records, job.calibration, place, seed, progress, bits, store, job.shards)
        if recipe.end_to_end.steps and job.shards.writes:  # one process does, the others are done
            ids_NT, seen_NT = job.tuning.ids_NT, job.calibration.ids_NT
            write_tuned(place, tune(source, recipe, job.records, calibration, ids_NT, seen_NT, seed, progress, store))
    return calibration


def _learned_rotation(job: Job, folder: RunFolder, progress: Progress) -> Rotation | None:
    """What the recipe's rotation learned, now or in an earlier attempt; None when it learns none. One process does."""
    transforms, place, seed = job.recipe.transforms, folder.calibration, job.request.seed
    if transforms.rotation != "learned":
        return None
    if job.shards.writes and not rotation_path(place).exists():
        model, ids = with_online(job.model, transforms), job.calibration.ids_NT
        write_rotation(place, learn_rotation(model, job.records, ids, seed, transforms.rotation_steps, progress))
    job.shards.wait()
    return read_rotation(place)


def run_quantize(job: Job, folder: RunFolder, calibration: Calibration, progress: Progress) -> QuantizedCheckpoint:
    """The fold and quantize stages."""
    if (folder.quantized / "quant.json").exists():
        return open_checkpoint(folder.quantized)
    with folder.stage("quantize"):
        folded = FoldedCheckpoint(job.source(calibration.rotation()), calibration.transforms())
        provenance = {
            "model": job.model.name if job.model.gguf is None else job.model.gguf.name,
            "weights_sha256": job.model.digest,
            "recipe": job.recipe.name,
            "target": job.target.name,
            "seed": job.request.seed,
            "versions": versions(job.target.tools),
        }
        recipe, path = job.recipe, folder.quantized
        return quantize(folded, calibration, job.records, recipe.embedding, path, provenance, progress, recipe.kv_cache)


def run_lower(job: Job, folder: RunFolder, checkpoint: QuantizedCheckpoint, progress: Progress) -> Bundle:
    """The lower stage."""
    if (folder.bundle / "manifest.json").exists():
        return open_bundle(folder.bundle, reports=False)
    with folder.stage("lower"):
        return lower(checkpoint, job, folder.bundle, progress)


def run_validate(
    job: Job,
    folder: RunFolder,
    checkpoint: QuantizedCheckpoint,
    calibration: Calibration,
    bundle: Bundle,
    progress: Progress,
    complete: Callable[[ValidationReport], ValidationReport] = lambda report: report,
) -> ValidationReport:
    """The validate and report stages. They always run: a report must be of the file that is there now.

    `complete` adds what else was to be measured before the reports are written.
    """
    if bundle.manifest.model.digest != job.model.digest:
        raise InputError("the bundle is of another model", where=str(bundle.folder), why=bundle.manifest.model.name)
    for name in REPORTS:  # whatever is found now, no older verdict may stand beside it
        (bundle.folder / name).unlink(missing_ok=True)
    shipped, where = load_folder_tokenizer(bundle.folder), str(bundle.folder / "tokenizer.json")
    refuse_other_tokenizer(shipped, job.tokenizer, job.evaluation.ids_NT.flatten(), where)
    with folder.stage("validate"):
        report = complete(validate_bundle(job, folder, checkpoint, calibration, bundle, progress))
    write_reports(bundle.folder, report, bundle.manifest.model.origin)
    seal(bundle.folder, bundle.manifest)
    return report
