"""What of a program is named in its coverage besides its linears: operators that stay float, and why."""

from __future__ import annotations

from collections.abc import Mapping

from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec.report import Coverage, Lowered, Refused


def coverage_with(
    checkpoint: QuantizedCheckpoint, operators: Mapping[str, int], reasons: Mapping[str, str]
) -> Coverage:
    """Every linear with its kernel, and every one of the program's `operators` that has a reason to stay float."""
    lowered = tuple(Lowered(name, record.kernel) for name, record in checkpoint.records.items())
    found = {operator: count for operator, count in sorted(operators.items()) if operator in reasons}
    return Coverage(lowered, tuple(Refused(what, count, reasons[what]) for what, count in found.items()))
