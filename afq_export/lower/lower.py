"""The lower stage: QuantizedCheckpoint and target -> Bundle."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from afq_export.files import folder_beside
from afq_export.job import Job, versions
from afq_export.lower.bundle import MODEL_FILES, Bundle, describe, new_manifest, open_bundle, save_model_files, seal
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint

VECTOR_TOKENS = 8
"""Tokens of the test vector in model.bpte."""


def lower(checkpoint: QuantizedCheckpoint, job: Job, folder: Path, progress: Progress) -> Bundle:
    """Writes the bundle to `folder`, whole or not at all, without its reports.

    Raises InputError when the target has no such program, VerdictError when the finished file does not hold the
    checkpoint's integers.
    """
    with folder_beside(folder) as part:
        model = part / MODEL_FILES[job.target.runtime]
        write_program(checkpoint, job, model, job.calibration.ids_NT[0, :VECTOR_TOKENS], progress)
        save_model_files(job.model, job.tokenizer, part)
        describe(job.recipe, job.target, part)
        command = command_line(job)
        seal(part, new_manifest(job.model, job.recipe, job.target, versions(), job.request.seed, command))
    return open_bundle(folder)


def write_program(checkpoint: QuantizedCheckpoint, job: Job, model: Path, vector: Tensor, progress: Progress) -> None:
    """model.pte, and model.bpte with a test vector: first tokens of the calibration text and the runtime's logits."""
    from afq_export.lower.executorch.bundled import bundled_program
    from afq_export.lower.executorch.program import lower_program
    from afq_export.runtime.executorch import ExecutorchSession

    program = lower_program(checkpoint, job.target, progress)
    model.write_bytes(program.pte)
    logits = ExecutorchSession(model).logits(vector)
    case = ([vector[None], torch.zeros(1, dtype=torch.int64)], [logits[None]])
    model.with_suffix(".bpte").write_bytes(bundled_program(program.pte, [case]))


def command_line(job: Job) -> list[str]:
    """The command as it was given, files by their names only: where they lie is one machine's own. The exact recipe and
    target are recipe.toml and target.toml of the bundle."""
    request = job.request
    parts = ["afq-export", "run", "--target", job.target.name, "--recipe", job.recipe.name]
    parts += ["--seed", str(request.seed), "--threads", str(job.threads)]
    for option, name in (("--model", request.model), ("--calib", request.calib)):
        if name:
            parts += [option, Path(name).name if Path(name).exists() else name]
    for change in request.changes:
        parts += ["--set", change]
    return parts + (["--tiny"] if request.tiny else [])
