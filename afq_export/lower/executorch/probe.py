"""Runs quantized linears alone through the real runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from afq_export.lower.executorch.compose import call_segment, export_program
from afq_export.lower.executorch.segments import Segment, probe_segment
from afq_export.lower.probe_input import probe_input
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.runtime.library import load_runtime


def run_linears(
    linears: Sequence[QuantizedLinear],
    inputs: Mapping[str, np.ndarray],
    keep: Callable[[bytes], None] = lambda program: None,
) -> dict[str, np.ndarray]:
    """What the kernel of each linear gives for `inputs[name]`, float32 [T, I]: float32 [T, O] by name.

    One program for all of them, given to `keep`. A static kernel's int8 result comes dequantized,
    `scale * (code - zero_point)` in float32; `rint(y / scale) + zero_point` is the code again. Raises InputError when
    an input is missing or does not fit its linear.
    """
    named = {linear.spec.name: linear for linear in linears}
    arrays = {name: probe_input(linear, inputs) for name, linear in named.items()}
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    segment = probe_segment(named, shapes)
    example = tuple(torch.from_numpy(array) for array in arrays.values())
    buffer = export_program(_Probe(segment), example, [segment]).buffer
    keep(buffer)
    results = load_runtime()._load_for_executorch_from_buffer(buffer).forward(list(example))
    return {name: result.numpy().copy() for name, result in zip(named, results, strict=True)}


class _Probe(nn.Module):
    """The segment and nothing else."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return call_segment(self.segment, list(inputs))
