"""Arm Cortex-M through ExecuTorch: model.pte with CMSIS-NN's int8 kernels for the blocks' linears, portable operators
between them. Made and read back here; its operators are computed by ExecuTorch's reference implementation of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.errors import InputError, MissingToolError
from afq_export.lower.bundle import Bundle
from afq_export.lower.memory import refuse_memory
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint
from afq_export.spec.recipe import Embedding
from afq_export.spec.report import Coverage, Lowered, Refused
from afq_export.spec.target import CortexMOptions, TargetProfile

if TYPE_CHECKING:
    from afq_export.lower.cortex_m.program import Shape

PROGRAM = "model.pte"
SMALLER = "shorter shapes"
"""What helps against a program that does not fit, besides a smaller model."""
ABSENT = "nothing here runs Cortex-M programs: CMSIS-NN's kernels are in no runtime for this machine"
ARITHMETICS = ("cmsis_nn.static_per_channel", "cmsis_nn.rows")
READ_TOKENS = 64
"""Tokens on which the program's operators are computed."""
PROGRAM_BYTES, BLOCK_BYTES = 25_000, 22_000
"""Operators of a program with no block, and of each block, by experience."""
ROW_BYTES = 8
"""Multiplier and shift of an output row."""


def refuse(target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
    """Kernels of another backend, programs that cannot fit the target's memory, and tools that are not there."""
    from afq_export.runtime.library import require_executorch

    for name in {record.kernel for record in records.values()}:
        if target.kernel(name).arithmetic not in ARITHMETICS:
            raise InputError("Cortex-M has no such kernel", where=f"{target.name}: {name}")
    least = least_memory(target, records)
    refuse_memory(_options(target), "cortex_m", *least, target.name, smaller=SMALLER, least="at least ")
    require_executorch()


def least_memory(target: TargetProfile, records: Mapping[str, LinearRecord]) -> tuple[int, int]:
    """Bytes of flash and SRAM that no program goes below: codes of linears and rows; the caches that a call takes, its
    logits, and lm_head's rows while they are float32."""
    head = records["lm_head"].spec
    codes = sum(r.spec.outputs * r.spec.inputs for r in records.values()) + head.outputs * head.inputs
    kept = sum(r.spec.outputs for r in records.values() if r.spec.role in ("k_proj", "v_proj"))
    context, tokens = target.shapes.context, min(target.shapes.prefill, target.shapes.context)
    return codes, 4 * (kept * (context + tokens) + tokens * head.outputs + head.outputs * head.inputs)


def overhead(config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
    """Operators by experience, cos and sin, multipliers and shifts."""
    shape = _shape(config, target)
    tables = 2 * shape.context * config.head_dim * 4 if config.rope else 0
    rows = sum(ROW_BYTES * record.spec.outputs for record in records.values())
    return tables + rows + 4 * shape.tokens**2 + PROGRAM_BYTES + BLOCK_BYTES * config.layers


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
    """model.pte. Raises InputError when its planned memory, or the file, is more than the target has."""
    from afq_export.lower.cortex_m.program import export_program, planned_memory

    program = export_program(checkpoint, _shape(checkpoint.config, target), progress)
    sram = planned_memory(program)
    refuse_memory(_options(target), "cortex_m", len(program), sram, target.name, smaller=SMALLER)
    (folder / PROGRAM).write_bytes(program)


def open_session(bundle: Bundle):
    """Raises MissingToolError: no runtime for it on this machine."""
    raise MissingToolError("the program cannot run here", where=str(bundle.model), why=ABSENT)


def runtime(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint):
    """No session; linears alone, and the whole decoder, by ExecuTorch's reference implementation of the operators."""
    from afq_export.validate.ladder import Runtime

    def probe(linears, inputs):
        from afq_export.lower.cortex_m.probe import run_linears

        return run_linears(linears, inputs)

    def more(ids_T):
        from afq_export.lower.cortex_m.probe import logits
        from afq_export.validate.meaning import meaning_check

        shape = _shape(checkpoint.config, target)
        return [meaning_check(lambda ids: logits(checkpoint, shape, ids), checkpoint, target, ids_T[:READ_TOKENS])]

    return Runtime(None, probe, more=more, absent=ABSENT)


def coverage(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Coverage:
    """Kernels of the file, and its portable operators."""
    from afq_export.lower.cortex_m.program import verify
    from afq_export.lower.cortex_m.readback import operators

    program = bundle.model.read_bytes()
    verify(checkpoint, program)
    lowered = tuple(Lowered(name, record.kernel) for name, record in checkpoint.records.items())
    calls = sorted(operators(program).items())
    return Coverage(lowered, tuple(Refused(what, n, "portable") for what, n in calls if what.startswith("aten::")))


def describe(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
    """Operators and planned memory of a .pte, and its linears."""
    from afq_export.lower.cortex_m.program import planned_memory
    from afq_export.lower.cortex_m.readback import operators, read_linears

    program = path.read_bytes()
    facts = {"operators": sum(operators(program).values()), "SRAM of a call": f"{planned_memory(program):,} bytes"}
    return facts, [
        (linear.kind, *linear.codes.shape, "int8 per_channel", "float" if linear.input is None else "int8 static")
        for linear in read_linears(program)
    ]


def _options(target: TargetProfile) -> CortexMOptions:
    if target.cortex_m is None:
        raise InputError("the target has no [cortex_m] table", where=target.name, do='start from base = "cortex-m55"')
    return target.cortex_m


def _shape(config: DecoderConfig, target: TargetProfile) -> Shape:
    from afq_export.lower.cortex_m.program import Shape

    context = min(config.max_positions, target.shapes.context)
    return Shape(min(target.shapes.prefill, context), context)
