"""Core ML: model.mlpackage for apps that use Core ML itself, and model.pte with the same package in its delegate.

Both are made and read back anywhere; only Apple's systems run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.errors import InputError, MissingToolError
from afq_export.lower.bundle import Bundle
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint
from afq_export.spec.recipe import Embedding
from afq_export.spec.report import Coverage
from afq_export.spec.target import TargetProfile

PROGRAM = "model.pte"
PACKAGE = "model.mlpackage"
ABSENT = "nothing here runs Core ML: it needs macOS or iOS"
ARITHMETIC = "coreml.weight_only"
READ_TOKENS = 64
"""Tokens on which the file's operations are computed."""
PROGRAM_BYTES, BLOCK_BYTES = 12_000, 25_000
"""Operations and names of a program with no block, and of each block, by experience."""


def refuse(target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
    """Kernels of another backend, and coremltools or ExecuTorch that are not there."""
    from afq_export.runtime.library import require_coremltools, require_executorch

    if target.coreml is None:
        raise InputError("the target has no [coreml] table", where=target.name, do='start from base = "ios-coreml"')
    for name in {record.kernel for record in records.values()}:
        if target.kernel(name).arithmetic != ARITHMETIC:
            raise InputError("Core ML has no such kernel", where=f"{target.name}: {name}")
    require_executorch()
    require_coremltools()


def overhead(config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
    """Operations and names by experience, cos and sin in float16, a bias of 0 for every linear that has none."""
    positions = min(config.max_positions, target.shapes.context)
    tables = 2 * positions * config.head_dim * 2 if config.rope else 0
    biases = sum(2 * record.spec.outputs for record in records.values() if not record.spec.bias)
    return tables + biases + PROGRAM_BYTES + BLOCK_BYTES * config.layers


def shares_rows(head: LinearRecord, embedding: Embedding, target: TargetProfile) -> bool:
    """Never: rows have float32 scales, the head float16 ones."""
    return False


def write(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    folder: Path,
    vector: Tensor,
    provenance: dict[str, str],
    progress: Progress,
) -> None:
    """model.mlpackage and model.pte. There are no test vectors: nothing here computes what a device would."""
    from afq_export.lower.coreml.program import lower_coreml

    (folder / PROGRAM).write_bytes(lower_coreml(checkpoint, target, folder / PACKAGE, provenance, progress))


def open_session(bundle: Bundle):
    """Raises MissingToolError: no runtime for it on this system."""
    raise MissingToolError("the program cannot run here", where=str(bundle.model), why=ABSENT)


def runtime(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint):
    """No session; the file's operations are computed by their meaning instead."""
    from afq_export.validate.ladder import Runtime

    def more(ids_T):
        from afq_export.lower.coreml.evaluate import PackageReader
        from afq_export.lower.coreml.readback import read_package
        from afq_export.validate.meaning import meaning_check

        read = PackageReader(read_package(bundle.folder / PACKAGE)).logits
        return [meaning_check(read, checkpoint, target, ids_T[:READ_TOKENS])]

    return Runtime(None, None, more=more, absent=ABSENT)


def coverage(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Coverage:
    """Kernels and float operations of both files, which must hold the same."""
    from afq_export.lower.coreml.program import coverage_of, read_delegate, verify_package
    from afq_export.lower.coreml.readback import read_package
    from afq_export.lower.executorch.readback import read_outline

    pte = bundle.model.read_bytes()
    verify_package(checkpoint, read_package(bundle.folder / PACKAGE))
    content = read_delegate(pte)
    verify_package(checkpoint, content)
    return coverage_of(checkpoint, content, read_outline(pte).calls)


def describe(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
    """States and linears of the package inside a .pte."""
    from afq_export.lower.coreml.program import read_delegate

    content = read_delegate(path.read_bytes())
    linears = []
    for _, linear in content.linears():
        outputs, inputs = linear.codes.shape
        groups = linear.scales.shape[1]
        grid = "per_channel" if groups == 1 else f"g{inputs // groups}"
        linears.append((linear.kind, outputs, inputs, f"{linear.kind} {grid}", "float"))
    facts = {
        "delegates": 1,
        "operations": len(content.operations),
        "states": len(content.states),
        "opset": content.opset,
        "tokens a call": content.prefill,
    }
    return facts, linears
