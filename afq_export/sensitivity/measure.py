"""The measurement: every option of every linear and of the token rows, in one pass over the calibration windows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from afq_export.arch.ops import Weights
from afq_export.calibrate.start import quantize_rows
from afq_export.job import Prepared
from afq_export.progress import Progress
from afq_export.quantize.assign import HEAD
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.quantize.quantize import quantize_embedding
from afq_export.sensitivity.damage import input_damage, logit_damage, rounding_error, row_damage, weight_damage
from afq_export.sensitivity.gradients import observe_gradients
from afq_export.sensitivity.options import ROWS, Options
from afq_export.spec.quant import QuantSpec, linear_name

HEAD_TOKENS = 128
"""Tokens of a window, evenly spaced, that lm_head is measured on."""

Damages = dict[str, tuple[float, ...]]
"""Name -> nats per token of each of its options."""


def measure(job: Prepared, options: Options, progress: Progress) -> Damages:
    """Damage of rounding each weight to nearest and of putting its input on its grid, all else float.

    No transform and no clipping of the recipe's method is in it, but a random rotation and Hadamard matrices are: it is
    `job.source()` that is measured.
    """
    found = _Damages(options)
    observe_gradients(job.source(), job.calibration.ids_NT, job.request.seed, found, progress)
    tokens = job.calibration.ids_NT.numel()
    damages = {
        name: tuple((found.weights[name][i] + found.inputs[name, r.spec.activation]) / tokens for i, r in enumerate(rs))
        for name, rs in options.linears.items()
    }
    damages[ROWS] = tuple(found.weights[ROWS][i] / tokens for i in range(len(options.rows)))
    return damages


class _Damages:
    """Sums over windows: by name and option, and by name and grid of the input, which options may share."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.weights: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self.inputs: dict[tuple[str, QuantSpec | None], float] = defaultdict(float)

    def block(self, index: int, weights: Weights) -> Callable[[str, Tensor, Tensor, Tensor], None]:
        roles = {name.removeprefix(linear_name(index, "")): name for name in self.options.linears if _in(name, index)}
        errors = {role: self._errors(self.options.linears[name], weights, role) for role, name in roles.items()}

        def show(role: str, x_TI: Tensor, through_TI: Tensor, gradient_TO: Tensor) -> None:
            name, gradient_OI = roles[role], gradient_TO.T @ x_TI
            for option, error_OI in enumerate(errors[role]):
                self.weights[name][option] += weight_damage(gradient_OI, error_OI)
            for grid in _activations(self.options.linears[name]):
                self.inputs[name, grid] += input_damage(through_TI, quantize_rows(x_TI, grid) - x_TI)

        return show

    def head(self, weights: Weights) -> Callable[[Tensor, Tensor], None]:
        records, weight_VD = self.options.linears[HEAD], weights[f"{HEAD}.weight"]
        errors = self._errors(records, weights, HEAD)

        def show(x_TD: Tensor, probabilities_TV: Tensor) -> None:
            """Every logit of a token counts in its damage exactly, so a few tokens stand for all."""
            step = max(1, len(x_TD) // HEAD_TOKENS)
            x_SD, p_SV, stands_for = x_TD[::step], probabilities_TV[::step], len(x_TD) / len(x_TD[::step])
            for grid in _activations(records):
                rounded_SD = quantize_rows(x_SD, grid)
                of_input_SV = (rounded_SD - x_SD) @ weight_VD.T
                for option, error_VD in enumerate(errors):
                    if records[option].spec.activation == grid:
                        error_SV = torch.addmm(of_input_SV, rounded_SD, error_VD.T)
                        self.weights[HEAD][option] += stands_for * logit_damage(p_SV, error_SV)

        return show

    def rows(self, rows_VD: Tensor) -> Callable[[Tensor, Tensor], None]:
        errors = [quantize_embedding(rows_VD, rows).dequantized() - rows_VD for rows in self.options.rows]

        def show(ids_T: Tensor, gradient_TD: Tensor) -> None:
            for option, error_VD in enumerate(errors):
                self.weights[ROWS][option] += row_damage(ids_T, gradient_TD, error_VD)

        return show

    @staticmethod
    def _errors(records: tuple[LinearRecord, ...], weights: Weights, role: str) -> list[Tensor]:
        return [rounding_error(weights[f"{role}.weight"], record.spec.weight) for record in records]


def _in(name: str, index: int) -> bool:
    return name.startswith(linear_name(index, ""))


def _activations(records: tuple[LinearRecord, ...]) -> list[QuantSpec | None]:
    """The different grids of the input."""
    return list(dict.fromkeys(record.spec.activation for record in records))
