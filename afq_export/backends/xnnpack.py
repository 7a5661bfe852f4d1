"""ExecuTorch with the XNNPACK delegate: model.pte, and model.bpte with test vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.lower.bundle import Bundle
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint
from afq_export.spec.recipe import Embedding
from afq_export.spec.report import Coverage
from afq_export.spec.target import TargetProfile

PROGRAM = "model.pte"
PROGRAM_BYTES = 8_000
"""Graph, operators and metadata of a program with no block, and ..."""
BLOCK_BYTES = 12_000
"""... of each block."""

WEIGHTS = {"qc8w": "int8 per_channel", "qc4w": "int4 per_channel", "qb4w": "int4", "qs8": "int8 per_channel"}
"""What reading a program back calls a kernel -> its weights' grid."""


def refuse(target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
    """Nothing besides what assigning kernels refuses."""


def overhead(config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
    """Graph and operators by experience, cos and sin as they are."""
    positions = min(config.max_positions, target.shapes.context)
    tables = 2 * positions * config.head_dim * 4 if config.rope else 0
    return tables + PROGRAM_BYTES + BLOCK_BYTES * config.layers


def shares_rows(head: LinearRecord, embedding: Embedding, target: TargetProfile) -> bool:
    """Never: the head's weights are the delegate's own."""
    return False


def write(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    folder: Path,
    vector: Tensor,
    provenance: dict[str, str],
    progress: Progress,
) -> None:
    """model.pte, and model.bpte with a test vector: the tokens `vector` and the runtime's logits."""
    from afq_export.lower.executorch.bundled import bundled_program
    from afq_export.lower.executorch.program import lower_program
    from afq_export.runtime.executorch import ExecutorchSession

    model = folder / PROGRAM
    program = lower_program(checkpoint, target, progress)
    model.write_bytes(program.pte)
    logits = ExecutorchSession(model).logits(vector)
    case = ([vector[None], torch.zeros(1, dtype=torch.int64)], [logits[None]])
    model.with_suffix(".bpte").write_bytes(bundled_program(program.pte, [case]))


def open_session(bundle: Bundle):
    """The program in ExecuTorch's runtime."""
    from afq_export.runtime.executorch import ExecutorchSession

    return ExecutorchSession(bundle.model)


def runtime(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint):
    """ExecuTorch's runtime for the bundle's program."""
    from afq_export.validate.ladder import Runtime

    def probe(linears, inputs, **keep):
        from afq_export.lower.executorch.probe import run_linears

        return run_linears(linears, inputs, **keep)

    def float_parts(session):
        from afq_export.lower.executorch.float_parts import ExecutorchFloatParts

        return ExecutorchFloatParts(session.context, session.prefill)

    return Runtime(lambda: open_session(bundle), probe, float_parts)


def coverage(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Coverage:
    """Kernels of the file, and the operators outside of its delegates."""
    from afq_export.lower.executorch.coverage import coverage_of
    from afq_export.lower.executorch.program import verify_program
    from afq_export.lower.executorch.readback import read_program

    content = read_program(bundle.model.read_bytes())
    verify_program(checkpoint, content)
    return coverage_of(checkpoint, content)


def describe(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
    """Delegates and operators of a .pte, and its linears."""
    from afq_export.lower.executorch.readback import read_program
    from afq_export.runtime.executorch import check_program_file
    from afq_export.runtime.library import load_runtime

    load_runtime()
    check_program_file(path)
    content = read_program(path.read_bytes())
    facts = {"delegates": content.delegates, "operators outside them": sum(content.calls.values())}
    linears = [
        (
            linear.kind,
            *linear.shape,
            WEIGHTS[linear.kind] + (f" g{linear.shape[1] // linear.scales.shape[1]}" if linear.kind == "qb4w" else ""),
            "int8 static" if linear.kind == "qs8" else "int8 dynamic",
        )
        for linear in content.linears
    ]
    return facts, linears
