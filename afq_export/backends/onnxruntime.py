"""ONNX Runtime: model.onnx with quantize and dequantize nodes, how to run it, and test vectors.

model.onnx, model.onnx.data                      the program, and its tensors where they are large
session_options.json                             options and providers that it is measured with
genai_config.json                                the same for onnxruntime-genai
test_data_set_0/{input,output}_*.pb              test vectors in ONNX's own form
model.ort, model.required_operators_and_types.config   for minimal builds, where the target asks for them
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.errors import InputError, VerdictError
from afq_export.lower.bundle import Bundle
from afq_export.progress import Progress
from afq_export.quantize.assign import session_options
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint
from afq_export.spec.recipe import Embedding
from afq_export.spec.report import Coverage
from afq_export.spec.target import TargetProfile

if TYPE_CHECKING:
    from afq_export.runtime.onnxruntime import RunOptions

PROGRAM = "model.onnx"
NBITS = "MatMulNBits"
LEVEL_ENTRY = "session.qdq_matmulnbits_accuracy_level"
"""At 0 MatMulNBits takes float activations, at 4, which is also what ONNX Runtime takes unasked, int8 ones."""
BYTE, MEGABYTE = 8, 1_000_000
SCALE_BYTES = 4
PROGRAM_BYTES = 5_000
"""Nodes, names and metadata of a file with no linear, and ..."""
NODE_BYTES = {NBITS: 500, "MatMulInteger": 1_140, "MatMulIntegerToFloat": 690, "QLinearMatMul": 900}
"""... of a linear, with its part of the block's other nodes, by what it runs as."""

SESSION_FILE = "session_options.json"


def refuse(target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
    """Kernels of another runtime, opset and IR version, execution providers, and session options that do not fit."""
    from afq_export.lower.onnx.genai import session_options as genai_options
    from afq_export.lower.onnx.linears import STORED, WRITERS
    from afq_export.lower.onnx.program import require_opset
    from afq_export.runtime import onnxruntime

    if target.onnx is None:
        raise InputError("the target has no [onnx] table", where=target.name, do='start from base = "linux-x64-ort"')
    for kernel in {record.kernel: target.kernel(record.kernel) for record in records.values()}.values():
        if kernel.arithmetic not in WRITERS:
            raise InputError("ONNX Runtime has no such kernel", where=f"{target.name}: {kernel.name}")
        if kernel.stored_bits not in STORED or kernel.runs_as not in NODE_BYTES:
            raise InputError(
                "a kernel does not fit",
                where=f"{target.name}: {kernel.name}",
                why=f"stored_bits {kernel.stored_bits} and runs_as {kernel.runs_as!r}",
                do=f"bits are {', '.join(map(str, STORED))}, operators {', '.join(NODE_BYTES)}",
            )
    require_opset(target)
    onnxruntime.require_onnxruntime()
    onnxruntime.refuse_missing_providers(target.onnx.providers)
    options = session_options(records, target)
    onnxruntime.session_options(options)
    genai_options(options)


def overhead(config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
    """Nodes and names by experience, half of cos and sin, zero points where they are written, repeated scales."""
    positions = min(config.max_positions, target.shapes.context)
    tables = positions * config.head_dim * 4 if config.rope else 0
    zero_points = repeated = 0
    for record in records.values():
        kernel, spec = target.kernel(record.kernel), record.spec
        groups = -(-spec.inputs // kernel.scale_group) if kernel.scale_group else spec.groups
        repeated += spec.outputs * (groups - spec.groups) * SCALE_BYTES
        if kernel.runs_as == NBITS and (target.onnx.explicit_zero_points or kernel.stored_bits == BYTE):
            zero_points += spec.outputs * groups * kernel.stored_bits // BYTE
    return (
        tables
        + PROGRAM_BYTES
        + sum(NODE_BYTES[target.kernel(r.kernel).runs_as] for r in records.values())
        + zero_points
        + repeated
    )


def shares_rows(head: LinearRecord, embedding: Embedding, target: TargetProfile) -> bool:
    """When both have the same grid and the head's kernel stores its codes in no more bits than the rows have."""
    kernel, weight = target.kernel(head.kernel), head.spec.weight
    static = kernel.arithmetic == "onnxruntime.static_to_float"
    same = embedding.bits == weight.bits == kernel.stored_bits and embedding.group == weight.group
    return same and not static and embedding.bits != 2  # what `embedding.is_shared` says of the file


def write(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    folder: Path,
    vector: Tensor,
    provenance: dict[str, str],
    progress: Progress,
) -> None:
    """model.onnx and everything in the module's table."""
    from afq_export.lower.onnx.genai import GENAI_CONFIG, genai_config
    from afq_export.lower.onnx.ort_format import write_ort_format
    from afq_export.lower.onnx.program import lower_onnx
    from afq_export.lower.onnx.vectors import write_vectors
    from afq_export.runtime.onnxruntime import OnnxSession, write_options

    lower_onnx(checkpoint, target, folder, provenance, progress)
    options = run_options(checkpoint, target)
    write_options(folder / SESSION_FILE, options)
    if sum(path.stat().st_size for path in folder.glob(f"{PROGRAM}*")) <= target.onnx.vectors_mb * MEGABYTE:
        inputs, outputs = OnnxSession(folder / PROGRAM, options).run_both(vector)
        write_vectors(folder, inputs, outputs)
    (folder / GENAI_CONFIG).write_text(
        genai_config(checkpoint.config, options.context, options.session, checkpoint.kv_cache), encoding="utf-8"
    )
    if target.onnx.ort_format:
        write_ort_format(folder / PROGRAM, folder, options.session)


def open_session(bundle: Bundle):
    """The program in ONNX Runtime, with the bundle's own options."""
    from afq_export.runtime.onnxruntime import OnnxSession

    return OnnxSession(bundle.model, _options(bundle))


def runtime(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint):
    """ONNX Runtime for the bundle's program."""
    from afq_export.validate.ladder import Runtime

    def probe(linears, inputs, **keep):
        from afq_export.lower.onnx.probe import run_linears

        return run_linears(linears, inputs, target, _options(bundle), **keep)

    def float_parts(session):
        from afq_export.lower.onnx.float_parts import OnnxFloatParts
        from afq_export.lower.onnx.program import opset_of

        kept = not checkpoint.kv_cache.quantized
        return OnnxFloatParts(opset_of(checkpoint, target), target, _options(bundle), kept)

    def more(ids):
        from afq_export.validate.onnxruntime import runtime_checks

        return runtime_checks(bundle.model, _options(bundle), target, checkpoint, ids)

    return Runtime(lambda: open_session(bundle), probe, float_parts, more)


def coverage(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Coverage:
    """Kernels of the file, and its float operators."""
    from afq_export.lower.onnx.coverage import coverage_of
    from afq_export.lower.onnx.program import verify
    from afq_export.lower.onnx.readback import read_onnx

    content = read_onnx(bundle.model)
    verify(checkpoint, target, content)
    verify_options(bundle, run_options(checkpoint, target))
    return coverage_of(checkpoint, content)


def run_options(checkpoint: QuantizedCheckpoint, target: TargetProfile) -> RunOptions:
    """How the target runs the checkpoint's program."""
    from afq_export.lower.onnx.program import context_length
    from afq_export.runtime.onnxruntime import RunOptions

    session, context = session_options(checkpoint.records, target), context_length(checkpoint, target)
    return RunOptions(session, target.onnx.providers, context, min(target.shapes.prefill, context))


def verify_options(bundle: Bundle, expected: RunOptions) -> None:
    """Raises VerdictError when the bundle's options are others: not each of them shows in a result on every CPU."""
    found = _options(bundle)
    if found == expected:
        return
    one, other = ({**options.session, **dataclasses.asdict(options)} for options in (found, expected))
    wrong = next(key for key in one | other if key != "session" and one.get(key) != other.get(key))
    why = f"{wrong} is {one.get(wrong)!r} instead of {other.get(wrong)!r}"
    raise VerdictError("the session options are not the target's", where=SESSION_FILE, why=why)


def describe(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
    """Opset and operators of a .onnx file, and its linears."""
    from afq_export.lower.onnx.readback import read_onnx

    content = read_onnx(path)
    facts = {"opset": content.opset, "operators": sum(content.operators.values())}
    level = json.loads(content.metadata.get("session_options", "{}")).get(LEVEL_ENTRY, "4")
    linears = []
    for linear in content.linears.values():
        kernel, activation = linear.kind, linear.activation
        if linear.scales.shape[1] > 1 or "blocks" in linear.kind:
            kernel, activation = NBITS, "float" if level == "0" else "int8 per group dynamic"
        elif linear.input is not None:
            kernel = "MatMulIntegerToFloat" if linear.output is None else "QLinearMatMul"
        linears.append((kernel, *linear.codes.shape, linear.weight, activation))
    return facts, linears


def _options(bundle: Bundle):
    from afq_export.runtime.onnxruntime import read_options

    return read_options(bundle.folder / SESSION_FILE)
