"""Targets whose compiler is a kit that its vendor hands out by itself: everything up to lowering works without it.

The kits could not be had here, so nothing is lowered to them: the quantized checkpoint is the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.errors import InputError, MissingToolError
from afq_export.extras import kit_present
from afq_export.lower.bundle import Bundle
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint
from afq_export.spec.recipe import Embedding
from afq_export.spec.report import Coverage
from afq_export.spec.target import Sdk, TargetProfile

PROGRAM = "model.pte"
WITHOUT = "`afq-export quantize` with the same options works without it"


def refuse(target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
    """Always: with the kit's name, version and source where it is missing, and with what is missing here where not."""
    sdk = kit(target)
    if not kit_present(sdk):
        raise MissingToolError(
            f"{sdk.name} {sdk.version} is not on this machine",
            where=target.name,
            why=f"only it makes programs for this target (looked for {_marks(sdk)})",
            do=f"get it from {sdk.get}; {WITHOUT}",
        )
    raise MissingToolError(
        f"no lowering to {sdk.name} yet",
        where=target.name,
        why="the kit is there, but the program that uses it could not be written without it",
        do=WITHOUT,
    )


def kit(target: TargetProfile) -> Sdk:
    """The target's kit. Raises InputError when the file names none."""
    if target.sdk is None:
        raise InputError("the target has no [sdk] table", where=target.name, do="name the kit that its programs need")
    return target.sdk


def overhead(config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
    """Not known: counted as nothing."""
    return 0


def shares_rows(head: LinearRecord, embedding: Embedding, target: TargetProfile) -> bool:
    """Not known: counted as two tensors."""
    return False


def write(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    folder: Path,
    vector: Tensor,
    provenance: dict[str, str],
    progress: Progress,
) -> None:
    """Refuses as `refuse` does."""
    refuse(target, checkpoint.records)


def open_session(bundle: Bundle):
    """There are no programs to run."""
    _no_program(str(bundle.folder))


def runtime(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint):
    """There are no programs to run."""
    _no_program(target.name)


def coverage(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Coverage:
    """There are no programs to read."""
    _no_program(target.name)


def describe(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
    """There are no programs to describe."""
    _no_program(str(path))


def _no_program(where: str) -> NoReturn:
    raise MissingToolError("no program was made for this target", where=where, why="its vendor's kit is missing")


def _marks(sdk: Sdk) -> str:
    marks = ([f"module {sdk.module}"] if sdk.module else []) + ([f"${sdk.variable}"] if sdk.variable else [])
    return " and ".join(marks)
