"""Qualcomm's HTP through ONNX Runtime's QNN provider: two static graphs, and the contexts compiled from them.

The files of a bundle are listed in afq_export/lower/qnn/program.py. `open_session` runs the compiled contexts, which
are what a device loads, in the x86 simulator that the onnxruntime-qnn wheel carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.errors import InputError
from afq_export.lower.bundle import Bundle
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint
from afq_export.spec.recipe import Embedding
from afq_export.spec.report import Coverage, Lowered
from afq_export.spec.target import TargetProfile

PROGRAM = "prefill.onnx"
PROGRAM_BYTES = 20_000
"""Nodes, names and metadata of a graph with no block, and ..."""
BLOCK_BYTES = 23_000
"""... of each block."""
ARITHMETIC = "qnn.static"
BYTE = 8
FIRST_ARCH = 73
"""The first HTP whose 16-bit sums are as validate/integer/qnn.py has them."""


def refuse(target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
    """A target without its table, kernels of another runtime, an HTP that is too old, a missing provider."""
    from afq_export.runtime.qnn import require_qnn

    if target.qnn is None or not target.static_graph:
        raise InputError(
            "the target has no [qnn] table, or no static_graph = true",
            where=target.name,
            do='start from base = "android-qnn-htp"',
        )
    for kernel in {record.kernel: target.kernel(record.kernel) for record in records.values()}.values():
        if kernel.arithmetic != ARITHMETIC or kernel.stored_bits not in (4, 8):
            raise InputError("the HTP has no such kernel", where=f"{target.name}: {kernel.name}")
    wide = any(record.spec.activation is not None and record.spec.activation.bits > BYTE for record in records.values())
    if wide and target.qnn.htp_arch < FIRST_ARCH:
        raise InputError(
            "no integer model of the HTP's 16-bit sums",
            where=f"target {target.name}: qnn.htp_arch = {target.qnn.htp_arch}",
            why=f"they are known from {FIRST_ARCH} on; before it they are off by tens of steps",
            do="take a recipe with 8-bit activations, e.g. w8a8-static",
        )
    if target.shapes.prefill >= target.shapes.context:
        why = f"prefill {target.shapes.prefill}, context {target.shapes.context}"
        raise InputError("prefill leaves no place in the context", where=target.name, why=why, do="make it smaller")
    require_qnn()


def overhead(config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
    """One graph's nodes and names by experience."""
    return PROGRAM_BYTES + BLOCK_BYTES * config.layers


def shares_rows(head: LinearRecord, embedding: Embedding, target: TargetProfile) -> bool:
    """Never: token rows are the host's."""
    return False


def write(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    folder: Path,
    vector: Tensor,
    provenance: dict[str, str],
    progress: Progress,
) -> None:
    """Graphs, contexts and the host's files; test vectors of the first tokens in codes."""
    from afq_export.lower.qnn.program import lower_qnn, write_step_vectors

    lower_qnn(checkpoint, target, folder, provenance, progress)
    write_step_vectors(folder, vector)


def open_session(bundle: Bundle):
    """The compiled programs, in the simulator."""
    from afq_export.runtime.qnn import require_qnn
    from afq_export.runtime.qnn_session import QnnSession

    require_qnn()
    return QnnSession(bundle.folder)


def runtime(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint):
    """The simulator for the bundle's programs."""
    from afq_export.validate.htp import htp_rung
    from afq_export.validate.ladder import Runtime

    def probe(linears, inputs, **keep):
        from afq_export.lower.qnn.probe import run_linears
        from afq_export.runtime.qnn import read_host_file

        return run_linears(linears, inputs, target, read_host_file(bundle.folder), **keep)

    def more(ids):
        from afq_export.validate.qnn import runtime_checks

        return runtime_checks(bundle.folder, target, ids)

    allowed = target.qnn.steps(checkpoint.tensors["hidden"].bits)
    steps = {"sigmoid": allowed.get("Sigmoid", 1), "probabilities": allowed.get("Softmax", 1)}
    return Runtime(
        lambda: open_session(bundle), probe, more=more, reference=lambda: htp_rung(checkpoint, target), steps=steps
    )


def coverage(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Coverage:
    """Every linear's kernel; no operator is refused, since none may stay float."""
    from afq_export.lower.qnn.readback import read_graph, verify_graph

    for name in ("prefill.onnx", "decode.onnx"):
        verify_graph(checkpoint, read_graph(bundle.folder / name), name)
    return Coverage(tuple(Lowered(name, record.kernel) for name, record in checkpoint.records.items()), ())


def describe(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
    """Opset and operators of a graph, and its linears."""
    from afq_export.lower.qnn.readback import read_graph

    content = read_graph(path)
    facts = {"opset": content.opset, "operators": sum(content.operators.values())}
    linears = [("MatMul", *linear.codes.shape, linear.weight, linear.activation) for linear in content.linears.values()]
    return facts, linears
