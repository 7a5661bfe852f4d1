"""ONNX Runtime: model.onnx with quantize and dequantize nodes, how to run it, and test vectors.

model.onnx, model.onnx.data                      the program, and its tensors where they are large
session_options.json                             options and providers that it is measured with
genai_config.json                                the same for onnxruntime-genai
test_data_set_0/{input,output}_*.pb              test vectors in ONNX's own form
model.ort, model.required_operators_and_types.config   for minimal builds, where the target asks for them
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.lower.bundle import Bundle
from afq_export.progress import Progress
from afq_export.quantize.assign import session_options
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint
from afq_export.spec.recipe import Embedding
from afq_export.spec.report import Coverage
from afq_export.spec.target import TargetProfile

NBITS, BYTE = "MatMulNBits", 8
PROGRAM_BYTES = 5_000
"""Nodes, names and metadata of a file with no linear, and ..."""
NODE_BYTES = {NBITS: 500, "MatMulInteger": 1_140, "MatMulIntegerToFloat": 690, "QLinearMatMul": 900}
"""... of a linear, with its part of the block's other nodes, by what it runs as."""

SESSION_FILE = "session_options.json"


def refuse(target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
    """Opset and IR version, execution providers, and session options of kernels that exclude each other."""
    from afq_export.lower.onnx.program import require_opset
    from afq_export.runtime.onnxruntime import refuse_missing_providers, require_onnxruntime

    require_opset(target)
    require_onnxruntime()
    refuse_missing_providers(target.onnx.providers)
    session_options(records, target)


def overhead(config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
    """Nodes and names by experience, half of cos and sin, zero points where they are written."""
    positions = min(config.max_positions, target.shapes.context)
    tables = positions * config.head_dim * 4 if config.rope else 0
    zero_points = 0
    for record in records.values():
        kernel = target.kernel(record.kernel)
        if kernel.runs_as == NBITS and (target.onnx.explicit_zero_points or kernel.stored_bits == BYTE):
            zero_points += record.spec.outputs * record.spec.groups * kernel.stored_bits // BYTE
    return (
        tables
        + PROGRAM_BYTES
        + sum(NODE_BYTES[target.kernel(r.kernel).runs_as] for r in records.values())
        + zero_points
    )


def shares_rows(head: LinearRecord, embedding: Embedding, target: TargetProfile) -> bool:
    """When both have the same grid and the head's kernel stores its codes in no more bits than the rows have."""
    kernel, weight = target.kernel(head.kernel), head.spec.weight
    static = kernel.arithmetic == "onnxruntime.static_to_float"
    same = embedding.bits == weight.bits == kernel.stored_bits and embedding.group == weight.group
    return same and not static


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
    from afq_export.lower.onnx.program import context_length, lower_onnx
    from afq_export.lower.onnx.vectors import write_vectors
    from afq_export.runtime.onnxruntime import OnnxSession, RunOptions, write_options

    content = lower_onnx(checkpoint, target, folder, provenance, progress)
    del content
    session = session_options(checkpoint.records, target)
    context = context_length(checkpoint, target)
    options = RunOptions(session, target.onnx.providers, context, min(target.shapes.prefill, context))
    write_options(folder / SESSION_FILE, options)
    opened = OnnxSession(folder / "model.onnx", options)
    inputs, outputs = opened.run_both(vector)
    write_vectors(folder, inputs, outputs)
    (folder / GENAI_CONFIG).write_text(genai_config(checkpoint.config, context, session), encoding="utf-8")
    if target.onnx.ort_format:
        write_ort_format(folder / "model.onnx", folder, session)


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

        return OnnxFloatParts(opset_of(checkpoint, target), target, _options(bundle))

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
    return coverage_of(checkpoint, content)


def describe(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
    """Opset and operators of a .onnx file, and its linears."""
    from afq_export.lower.onnx.readback import read_onnx

    content = read_onnx(path)
    facts = {"opset": content.opset, "operators": sum(content.operators.values())}
    linears = [
        (linear.kind, *linear.codes.shape, linear.weight, linear.activation) for linear in content.linears.values()
    ]
    return facts, linears


def _options(bundle: Bundle):
    from afq_export.runtime.onnxruntime import read_options

    return read_options(bundle.folder / SESSION_FILE)
