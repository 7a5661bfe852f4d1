"""Vulkan: model.pte whose decoder is a delegate for the phone's GPU. Made and read back here, run on phones only."""

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
ABSENT = "nothing here runs Vulkan programs: ExecuTorch's runtime for Linux is built without the backend"
ARITHMETICS = ("vulkan.weight_only", "vulkan.dynamic_per_group")
READ_TOKENS = 64
"""Tokens on which the delegate's operators are computed."""
PROGRAM_BYTES, BLOCK_BYTES = 12_000, 12_000
"""Graph and metadata of a program with no block, and of each block, by experience."""


def refuse(target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
    """Kernels of another backend, and ExecuTorch where it is not installed."""
    from afq_export.runtime.library import require_executorch

    for name in {record.kernel for record in records.values()}:
        if target.kernel(name).arithmetic not in ARITHMETICS:
            raise InputError("the Vulkan delegate has no such kernel", where=f"{target.name}: {name}")
    require_executorch()


def overhead(config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
    """Graph by experience, cos and sin as they are, and the sums of codes that dynamic kernels keep."""
    positions = min(config.max_positions, target.shapes.context)
    tables = 2 * positions * config.head_dim * 4 if config.rope else 0
    dynamic = [record.spec for record in records.values() if record.spec.activation is not None]
    sums = sum(4 * spec.outputs * spec.groups for spec in dynamic)
    return tables + sums + PROGRAM_BYTES + BLOCK_BYTES * config.layers


def shares_rows(head: LinearRecord, embedding: Embedding, target: TargetProfile) -> bool:
    """Never: rows and head are constants of their own."""
    return False


def write(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    folder: Path,
    vector: Tensor,
    provenance: dict[str, str],
    progress: Progress,
) -> None:
    """model.pte. There are no test vectors: nothing here computes what a device would."""
    from afq_export.lower.vulkan.program import lower_vulkan

    (folder / PROGRAM).write_bytes(lower_vulkan(checkpoint, target, progress))


def open_session(bundle: Bundle):
    """Raises MissingToolError: no runtime for it on this system."""
    raise MissingToolError("the program cannot run here", where=str(bundle.model), why=ABSENT)


def runtime(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint):
    """No session; the delegate's operators are computed by their meaning instead."""
    from afq_export.validate.ladder import Runtime

    def more(ids_T):
        from afq_export.lower.vulkan.evaluate import VulkanReader
        from afq_export.lower.vulkan.readback import read_vulkan
        from afq_export.validate.meaning import meaning_check

        reader = VulkanReader(read_vulkan(bundle.model.read_bytes()), checkpoint, target.shapes.prefill)
        return [meaning_check(reader.logits, checkpoint, target, ids_T[:READ_TOKENS])]

    return Runtime(None, None, more=more, absent=ABSENT)


def coverage(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Coverage:
    """Kernels and float operators of the delegate, and what is not delegated."""
    from afq_export.lower.vulkan.program import coverage_of, verify_vulkan
    from afq_export.lower.vulkan.readback import read_vulkan

    content = read_vulkan(bundle.model.read_bytes())
    verify_vulkan(checkpoint, content)
    return coverage_of(checkpoint, content)


def describe(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
    """Delegates and operators of a .pte, and its linears."""
    from afq_export.lower.vulkan.readback import DYNAMIC, read_vulkan

    content = read_vulkan(path.read_bytes())
    linears = []
    for linear in content.linears:
        (outputs, inputs), groups = linear.codes.shape, linear.scales.shape[1]
        grid = "int4 per_channel" if groups == 1 else f"int4 g{inputs // groups}"
        activation = "int8 dynamic" if linear.kind == DYNAMIC else "float"
        linears.append((linear.kind.split(".")[1], outputs, inputs, grid, activation))
    facts = {"delegates": len(content.delegates), "operators outside them": sum(content.outline.calls.values())}
    return facts, linears
