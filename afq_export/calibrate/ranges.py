"""Static activation ranges from the calibration windows: a grid for every static linear's input, and for its output
where the kernel leaves it on one."""

from __future__ import annotations

import torch
from torch import Tensor

from afq_export.arch.decoder import block
from afq_export.arch.ops import FloatOps, Weights
from afq_export.calibrate.learn import BlockProblem
from afq_export.calibrate.observer import Method, Observer
from afq_export.calibrate.ops import QuantizedPathOps, seen_range
from afq_export.calibrate.tensors import TensorGrids, static_ops
from afq_export.quantize.activations import fake_quantize_static
from afq_export.quantize.checkpoint import StaticRange


class _ObservingOps(QuantizedPathOps):
    """The quantized path, with every static linear's input and output watched before they are quantized.

    Linears that share their input share its observer, and so its grid: the program quantizes it once.
    """

    def __init__(self, problem: BlockProblem, weights: Weights, seen: dict[str, tuple[Observer, Observer]]) -> None:
        super().__init__(problem.config, weights, problem.records, kv_cache=problem.kv_cache)
        self.seen, self._input, self._role = seen, None, ""

    def linear(self, role: str, x: Tensor) -> Tensor:
        spec = self.records[role].spec
        if spec.activation is None or spec.activation.dynamic:
            return super().linear(role, x)
        if role not in self.seen:
            bits = spec.activation.bits
            shared = self.seen[self._role][0] if self._input is x else Observer(bits)
            self.seen[role] = (shared, Observer(bits))
        before, after = self.seen[role]
        if self._input is not x:
            before.see(x)
        self._input, self._role = x, role
        y = FloatOps.linear(self, role, fake_quantize_static(x, seen_range(x, before.bits)))
        after.see(y)
        return fake_quantize_static(y, seen_range(y, after.bits)) if spec.output == "static" else y


@torch.no_grad()
def observe_ranges(
    problem: BlockProblem, weights: Weights, method: Method, batch: int
) -> dict[str, tuple[StaticRange, StaticRange | None]]:
    """(input, output) grids by role, of the block with its folded and quantized `weights` on its own inputs; no output
    grid where the kernel leaves its result float."""
    seen: dict[str, tuple[Observer, Observer]] = {}
    for x in problem.inputs.split(batch):
        block(problem.config, _ObservingOps(problem, weights, seen), x)
    kept = {role for role, record in problem.records.items() if record.spec.output == "static"}
    inputs: dict[Observer, StaticRange] = {}
    for before, _ in seen.values():
        if before not in inputs:
            takers = [weights[f"{role}.weight"] for role, (observer, _) in seen.items() if observer is before]
            inputs[before] = before.grid_for(takers) if method == "output" else before.grid(method)
    elementwise: Method = "mse" if method == "output" else method
    return {
        role: (inputs[before], after.grid(elementwise) if role in kept else None)
        for role, (before, after) in seen.items()
    }


@torch.no_grad()
def observe_tensors(problem: BlockProblem, weights: Weights, method: Method, batch: int) -> dict[str, StaticRange]:
    """Grids of all tensors of the block by name, with its folded and quantized `weights` on its own inputs."""
    grids = TensorGrids(problem.config, problem.tensor_bits, observe=True)
    for x in problem.inputs.split(batch):
        block(problem.config, static_ops(problem.config, weights, grids), x)
    return grids.found(method, weights)
