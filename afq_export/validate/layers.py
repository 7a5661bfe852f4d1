"""Every quantized linear alone in the real runtime, on the activations it really gets, against its integer model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from afq_export.arch import decoder
from afq_export.load.checkpoint import DecoderWeights
from afq_export.progress import Progress, silent
from afq_export.quantize.activations import quantize_dynamic
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.spec.quant import linear_name
from afq_export.spec.report import LayerReport
from afq_export.spec.target import Kernel, TargetProfile
from afq_export.validate.integer.linear import integer_linear
from afq_export.validate.rungs import ObservedOps, integer_rung, run_block

Probe = Callable[[Sequence[QuantizedLinear], Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Runs linears alone in the real runtime: float32 inputs [T, I] by name -> float32 outputs [T, O] by name."""


@torch.no_grad()
def check_layers(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    ids_T: Tensor,
    probe: Probe,
    folded: DecoderWeights | None = None,
    progress: Progress = silent,
) -> list[LayerReport]:
    """All linears in the order in which they run, on the tokens `ids_T` as the integer rung sees them.

    One block's linears are in memory, and in one program, at a time. `folded` is the float model that was quantized,
    for the SQNR; None leaves it out.
    """
    config, rung = checkpoint.config, integer_rung(checkpoint, target)
    reports: list[LayerReport] = []
    x = rung.embed(ids_T[None])
    for index in range(config.layers):
        progress("layers", index, config.layers + 1)
        inputs: dict[str, Tensor] = {}
        x = run_block(rung, ObservedOps(rung.block(index), inputs.__setitem__), x)
        linears = {role: checkpoint.linear(linear_name(index, role)) for role in inputs}
        floats = folded.block(index) if folded else None
        reports += _check_together(linears, inputs, floats, target, probe)
    progress("layers", config.layers, config.layers + 1)
    inputs = {}
    decoder.head(ObservedOps(rung.head(), inputs.__setitem__), x)
    floats = folded.head() if folded else None
    reports += _check_together({"lm_head": checkpoint.linear("lm_head")}, inputs, floats, target, probe)
    progress("layers", config.layers + 1, config.layers + 1)
    return reports


def _check_together(
    linears: Mapping[str, QuantizedLinear],
    inputs: Mapping[str, Tensor],
    floats: Mapping[str, Tensor] | None,
    target: TargetProfile,
    probe: Probe,
) -> list[LayerReport]:
    """Reports of linears by role, from one probe call. `inputs` [1, T, I] by role."""
    arrays = {linear.spec.name: inputs[role][0].numpy() for role, linear in linears.items()}
    outputs = probe(list(linears.values()), arrays)
    return [
        compare_layer(
            linear,
            target.kernel(linear.record.kernel),
            inputs[role][0],
            torch.from_numpy(np.ascontiguousarray(outputs[linear.spec.name])),
            None if floats is None else (floats[f"{role}.weight"], floats.get(f"{role}.bias")),
        )
        for role, linear in linears.items()
    ]


def compare_layer(
    linear: QuantizedLinear,
    kernel: Kernel,
    x_TI: Tensor,
    theirs_TO: Tensor,
    original: tuple[Tensor, Tensor | None] | None = None,
) -> LayerReport:
    """`theirs` is what the runtime gave for `x`; `original` the float weight [O, I] and bias that were quantized."""
    ours_TO = integer_linear(kernel.arithmetic, linear, x_TI)
    difference = (ours_TO.double() - theirs_TO.double()).abs()
    relative = float(difference.max() / ours_TO.double().abs().max().clamp(min=1e-30))
    exact = torch.equal(ours_TO, theirs_TO)
    steps = _finite((difference / output_step(linear, x_TI)).max())
    # Half a step more: both are on the grid, and the quotient of two multiples of its step is not always whole.
    within = kernel.max_steps > 0 and steps is not None and steps <= kernel.max_steps + 0.5
    return LayerReport(
        name=linear.spec.name,
        kernel=kernel.name,
        passed=exact or within or relative <= kernel.max_relative_error,
        exact=exact,
        max_steps=steps,
        max_relative_error=_finite(relative),
        sqnr_db=None if original is None else _finite(sqnr_db(x_TI, *original, ours_TO)),
        note=linear.record.note,
    )


def output_step(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """The size of one step of the output, float64, broadcast to [T, O].

    Where the output is on a grid: one of its codes. Where it is float: one unit of the int32 accumulator, that is the
    (smallest) activation step of the token times the row's (smallest) weight scale; a single wrong code moves the
    output by at least that, another order of float32 additions by far less. NaN where only weights are quantized.
    """
    record, activation = linear.record, linear.spec.activation
    if record.output is not None:
        return torch.tensor(record.output.scale, dtype=torch.float64)
    if activation is None:
        return torch.tensor(torch.nan, dtype=torch.float64)
    smallest_O = _smallest(linear.scales.double())
    if record.input is not None:
        return record.input.scale * smallest_O
    return _smallest(quantize_dynamic(x_TI, activation).step.double().flatten(1))[:, None] * smallest_O


def _smallest(steps: Tensor) -> Tensor:
    """The least positive value of each row."""
    return torch.where(steps > 0, steps, torch.inf).amin(-1)


def sqnr_db(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, quantized_TO: Tensor) -> float:
    """10 log10(|y|^2 / |y - quantized|^2) in float64, y the float layer's output on the same input."""
    y_TO = x_TI.double() @ weight_OI.double().t()
    y_TO = y_TO if bias_O is None else y_TO + bias_O.double()
    noise = float((y_TO - quantized_TO.double()).square().sum())
    return 10 * math.log10(float(y_TO.square().sum()) / noise) if noise else math.inf


def _finite(value: float | Tensor) -> float | None:
    """JSON has no infinities."""
    return float(value) if math.isfinite(float(value)) else None
