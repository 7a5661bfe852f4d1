"""Linears alone, and the whole decoder, by ExecuTorch's reference implementation of the operators in the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from afq_export.lower.cortex_m.module import CortexMDecoder, linear_module
from afq_export.lower.cortex_m.program import Shape, example_inputs
from afq_export.lower.probe_input import probe_input
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear


@torch.no_grad()
def run_linears(linears: Sequence[QuantizedLinear], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the operator of each linear gives for `inputs[name]`, float32 [T, I]: float32 [T, O] by name."""
    rows = {linear.spec.name: torch.from_numpy(probe_input(linear, inputs))[None] for linear in linears}
    return {linear.spec.name: linear_module(linear)(rows[linear.spec.name])[0].numpy() for linear in linears}


@torch.no_grad()
def logits(checkpoint: QuantizedCheckpoint, shape: Shape, ids_T: Tensor) -> Tensor:
    """Float32 [T, V] of a sequence, in calls of the program's length; the caches are kept here, as a host does."""
    module = CortexMDecoder(checkpoint, shape.tokens, shape.context).eval()
    _, _, *caches = example_inputs(checkpoint, shape)
    rows = []
    for start in range(0, len(ids_T), shape.tokens):
        part = ids_T[start : start + shape.tokens]
        ids = torch.nn.functional.pad(part, (0, shape.tokens - len(part)))[None]
        found, *fresh = module(ids, torch.tensor([start]), *caches)
        rows.append(found[0, : len(part)])
        for cache, new in zip(caches, fresh, strict=True):
            cache[:, start : start + len(part)] = new[:, : len(part)]
    return torch.cat(rows)
