"""The lower stage: QuantizedCheckpoint and target -> Bundle."""

from __future__ import annotations

from pathlib import Path

import msgspec

from afq_export.backends import backend
from afq_export.files import folder_beside, write_text
from afq_export.job import Job, versions
from afq_export.lower.bundle import Bundle, describe, new_manifest, open_bundle, save_model_files, seal
from afq_export.lower.sbom import SBOM, sbom
from afq_export.progress import Progress
from afq_export.quantize.cache import cache_facts
from afq_export.quantize.checkpoint import QuantizedCheckpoint

VECTOR_TOKENS = 8
"""Tokens of the test vectors."""


def lower(checkpoint: QuantizedCheckpoint, job: Job, folder: Path, progress: Progress) -> Bundle:
    """Writes the bundle to `folder`, whole or not at all, without its reports.

    Raises InputError when the target has no such program, VerdictError when the finished file does not hold the
    checkpoint's integers.
    """
    with folder_beside(folder) as part:
        vector = job.calibration.ids_NT[0, :VECTOR_TOKENS]
        chosen = backend(job.target.backend)
        chosen.write(checkpoint, job.target, part, vector, provenance(checkpoint, job), progress)
        save_model_files(job.model, job.tokenizer, part)
        describe(job.recipe, job.target, part)
        made = (versions(job.target.tools), job.request.seed, command_line(job))
        manifest = new_manifest(job.model, job.recipe, job.target, chosen.PROGRAM, *made)
        cache = cache_facts(checkpoint.kv_cache, checkpoint.config, job.target)
        manifest = msgspec.structs.replace(manifest, kv_cache=cache)
        write_text(part / SBOM, sbom(manifest.model, checkpoint.digest, manifest.versions))
        seal(part, manifest)
    return open_bundle(folder)


def provenance(checkpoint: QuantizedCheckpoint, job: Job) -> dict[str, str]:
    """What a program says about itself where its format has room: model, recipe, target, digests, versions."""
    made = {f"version.{name}": number for name, number in versions(job.target.tools).items()}
    return {
        "model": Path(job.model.name).name,
        "weights_sha256": job.model.digest,
        "checkpoint_sha256": checkpoint.digest,
        "recipe": job.recipe.name,
        "target": job.target.name,
        "seed": str(job.request.seed),
    } | made


def command_line(job: Job) -> list[str]:
    """The command as it was given, files by their names only: where they lie is one machine's own. The exact recipe and
    target are recipe.toml and target.toml of the bundle."""
    request = job.request
    parts = ["afq-export", "run", "--target", job.target.name, "--recipe", job.recipe.name]
    parts += ["--seed", str(request.seed), "--threads", str(job.threads)]
    parts += ["--shards", str(job.shards.count)] if job.shards.count > 1 else []
    parts += ["--device", job.device] if job.device != "cpu" else []
    for option, name in (("--model", request.model), ("--calib", request.calib)):
        if name:
            parts += [option, Path(name).name if Path(name).exists() else name]
    for change in request.changes:
        parts += ["--set", change]
    return parts + (["--tiny"] if request.tiny else [])
