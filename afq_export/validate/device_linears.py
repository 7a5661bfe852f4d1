"""Quantized linears alone on a device: the very programs that ran on this machine, on the same inputs, compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from afq_export.device.session import LinearProgram
from afq_export.progress import Progress, silent
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.spec.report import Check
from afq_export.spec.target import TargetProfile
from afq_export.validate.layers import check_layers

Probe = Callable[..., dict[str, np.ndarray]]
"""A runtime's probe (layers.py) that gives the program which it makes to its argument `keep`."""

ROUNDING = 1e-6
"""What another instruction set may change at most, over the largest |output|, where a kernel ends in float32: the order
of additions, and whether they are fused with multiplications. A single wrong code is a thousand times more."""


@dataclasses.dataclass(frozen=True)
class ComparedLinears:
    """Linears of a device: how many, how many equal bit for bit, and those beyond their bound with their errors.

    `worst` and `error` are of the one that is farthest off, over the largest |output|; None when all are equal.
    """

    count: int
    exact: int
    beyond: Mapping[str, float]
    worst: str | None
    error: float


def record_linears(
    checkpoint: QuantizedCheckpoint, target: TargetProfile, ids_T: Tensor, probe: Probe, progress: Progress = silent
) -> list[LinearProgram]:
    """Programs of all linears, on the activations that they get for the tokens `ids_T` int64 [T]."""
    recorded: list[LinearProgram] = []

    def keeping(linears: Sequence[QuantizedLinear], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        kept: list[bytes] = []
        outputs = probe(linears, inputs, keep=kept.append)
        bounds = {one.spec.name: target.kernel(one.record.kernel).max_relative_error for one in linears}
        ordered = {name: np.ascontiguousarray(inputs[name], np.float32) for name in bounds}
        recorded.append(LinearProgram(kept[0], ordered, outputs, bounds))
        return outputs

    check_layers(checkpoint, target, ids_T, keeping, progress=progress)
    return recorded


def compare_linears(programs: Sequence[LinearProgram], there: Sequence[Mapping[str, np.ndarray]]) -> ComparedLinears:
    """What a device gave for each of `programs` against this machine."""
    errors, bounds = {}, {}
    for program, outputs in zip(programs, there, strict=True):
        for name, here_TO in program.outputs.items():
            errors[name] = _error(here_TO, outputs[name])
            bounds[name] = max(program.bounds[name], ROUNDING)
    worst = max(errors, key=lambda name: errors[name])
    return ComparedLinears(
        count=len(errors),
        exact=sum(error == 0.0 for error in errors.values()),
        beyond={name: error for name, error in errors.items() if not error <= bounds[name]},
        worst=worst if errors[worst] else None,
        error=errors[worst],
    )


def linears_check(device: str, found: ComparedLinears, tokens: int) -> Check:
    """Passed when every linear is within its kernel's bound; else names how many are not, the first, and the worst."""
    detail = f"{found.exact} of {found.count} linears equal this machine's bit for bit on {tokens} tokens"
    if found.worst:
        detail += f", farthest off {found.worst} by {found.error:.1e} of its largest output"
    if found.beyond:
        first = next(iter(found.beyond))
        detail = f"{len(found.beyond)} depart by more than rounding, first {first}; {detail}"
    return Check(name=f"linears on {device}", status="failed" if found.beyond else "passed", detail=detail)


def _error(here: np.ndarray, there: np.ndarray) -> float:
    """Largest |difference| over the largest |here|; 0 only for equal bits, infinity for NaN and other shapes."""
    if here.shape != there.shape or not np.isfinite(there).all():
        return float("inf")
    if np.array_equal(here, there):
        return 0.0
    difference = np.abs(here.astype(np.float64) - there).max()
    return float(difference / max(np.abs(here).max(), 1e-30))
