"""OpenVINO: its own format, with weights that its plugins decompress inside of the matrix product.

openvino_model.xml, openvino_model.bin     the program and its tensors, under the names that optimum-intel looks for
openvino_properties.json                   device and properties that it is measured with
test_vectors.safetensors                   tokens, and the logits that the runtime gave for them
"""

from __future__ import annotations

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
    from afq_export.runtime.openvino import RunOptions

PROGRAM = "openvino_model.xml"
PROPERTIES = "openvino_properties.json"
PROGRAM_BYTES = 20_000
"""Nodes and names, as text, of a program with no block, ..."""
BLOCK_BYTES = {True: 30_000, False: 12_000}
"""... of each block besides its linears, with rotary positions or without, ..."""
LINEAR_BYTES = 5_000
"""... and of each linear."""


def refuse(target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
    """Kernels of another runtime, no OpenVINO, no such device."""
    from afq_export.runtime.openvino import require_device

    if target.openvino is None:
        raise InputError(
            "the target has no [openvino] table", where=target.name, do='start from base = "intel-openvino"'
        )
    require_device(target.openvino.device)
    from afq_export.lower.openvino.linears import ARITHMETICS, STORED  # imports OpenVINO

    for kernel in {record.kernel: target.kernel(record.kernel) for record in records.values()}.values():
        if kernel.arithmetic not in ARITHMETICS or kernel.stored_bits not in STORED:
            why = f"arithmetic {kernel.arithmetic}, {kernel.stored_bits} bits stored"
            raise InputError("OpenVINO has no such kernel", where=f"{target.name}: {kernel.name}", why=why)


def overhead(config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
    """Nodes and names by experience, half of cos and sin."""
    positions = min(config.max_positions, target.shapes.context)
    tables = positions * config.head_dim * 4 if config.rope else 0
    nodes = BLOCK_BYTES[config.rope is not None] * config.layers + LINEAR_BYTES * len(records)
    return tables + PROGRAM_BYTES + nodes


def shares_rows(head: LinearRecord, embedding: Embedding, target: TargetProfile) -> bool:
    """When both have the same grid: rows are looked up in what the head multiplies with."""
    weight = head.spec.weight
    stored = target.kernel(head.kernel).stored_bits
    return embedding.bits == weight.bits == stored and embedding.group == weight.group


def write(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    folder: Path,
    vector: Tensor,
    provenance: dict[str, str],
    progress: Progress,
) -> None:
    """Everything in the module's table."""
    from safetensors.torch import save_file

    from afq_export.lower.openvino.program import lower_openvino
    from afq_export.runtime.openvino import OpenvinoSession, write_options

    lower_openvino(checkpoint, target, folder, provenance, progress)
    options = run_options(checkpoint, target)
    write_options(folder / PROPERTIES, options)
    logits = OpenvinoSession(folder / PROGRAM, options).logits(vector)
    save_file({"input_ids": vector.contiguous(), "logits": logits}, folder / "test_vectors.safetensors")


def open_session(bundle: Bundle):
    """The program in OpenVINO, with the bundle's own properties."""
    from afq_export.runtime.openvino import OpenvinoSession

    return OpenvinoSession(bundle.model, _options(bundle))


def runtime(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint):
    """OpenVINO for the bundle's program."""
    from afq_export.validate.ladder import Runtime

    def probe(linears, inputs):
        from afq_export.lower.openvino.probe import run_linears

        return run_linears(linears, inputs, target, _options(bundle))

    def float_parts(session):
        from afq_export.lower.openvino.float_parts import OpenvinoFloatParts

        return OpenvinoFloatParts(target, _options(bundle))

    def more(ids):
        from afq_export.validate.openvino import runtime_checks

        return runtime_checks(bundle.model, _options(bundle), target, checkpoint, ids)

    return Runtime(lambda: open_session(bundle), probe, float_parts, more)


def coverage(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Coverage:
    """Kernels of the file, and its float operators."""
    from afq_export.lower.openvino.coverage import coverage_of
    from afq_export.lower.openvino.program import verify
    from afq_export.lower.openvino.readback import read_program

    content = read_program(bundle.model)
    verify(checkpoint, target, content)
    found, expected = _options(bundle), run_options(checkpoint, target)
    if found != expected:
        raise VerdictError("the properties are not the target's", where=PROPERTIES, why=f"{found}, not {expected}")
    return coverage_of(checkpoint, content)


def run_options(checkpoint: QuantizedCheckpoint, target: TargetProfile) -> RunOptions:
    """How the target runs the checkpoint's program."""
    from afq_export.lower.onnx.program import context_length
    from afq_export.runtime.openvino import RunOptions

    context = context_length(checkpoint, target)
    properties = session_options(checkpoint.records, target)
    return RunOptions(properties, target.openvino.device, context, min(target.shapes.prefill, context))


def describe(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
    """Operators and properties of a program, and its linears."""
    from afq_export.lower.openvino.readback import read_program

    content = read_program(path)
    facts = {"operators": sum(content.operators.values()), "properties": _text(content.properties)}
    return facts, [
        ("FullyConnected", *linear.codes.shape, linear.weight, linear.activation) for linear in content.linears.values()
    ]


def _text(properties: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in properties.items()) or "none"


def _options(bundle: Bundle) -> RunOptions:
    from afq_export.runtime.openvino import read_options

    return read_options(bundle.folder / PROPERTIES)
