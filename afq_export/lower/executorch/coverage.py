"""What of a program runs as an integer kernel, what as a float operator, and why."""

from __future__ import annotations

from afq_export.lower.executorch.readback import ProgramContent
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec.report import Coverage, Lowered, Refused

REASONS = {
    "llama::custom_sdpa": "attention over the cache: float32, ExecuTorch's own kernel; XNNPACK has none with state",
    "llama::update_cache": "writes keys and values, or their codes and grids: the cache, state of the program",
    "quantized_decomposed::embedding_byte": "looks up int8 rows and scales them: XNNPACK has no look-up",
    "quantized_decomposed::embedding_4bit": "looks up int4 rows and scales them: XNNPACK has no look-up",
    "quantized_decomposed::embedding_2bit": "looks up int2 rows and scales them: XNNPACK has no look-up",
    "aten::embedding": "looks up float32 rows: XNNPACK has no look-up",
    "aten::slice_copy": "takes the rotation of these positions from a table",
    "aten::index": "takes the rows of these positions from a table",
}
"""Operator outside the delegates -> why it is there. The rest is bookkeeping of shapes and positions."""

BOOKKEEPING = "bookkeeping of token positions and shapes: no arithmetic on activations"


def coverage_of(checkpoint: QuantizedCheckpoint, content: ProgramContent) -> Coverage:
    """Every linear with its kernel, and every operator that the delegates do not hold, with its reason."""
    lowered = tuple(Lowered(name, record.kernel) for name, record in checkpoint.records.items())
    counts: dict[str, int] = {}
    for operator, count in content.calls.items():
        name = operator.rsplit(".", 1)[0]
        what = name if name in REASONS else "positions and shapes"
        counts[what] = counts.get(what, 0) + count
    refused = tuple(Refused(what, count, REASONS.get(what, BOOKKEEPING)) for what, count in sorted(counts.items()))
    return Coverage(lowered, refused)
