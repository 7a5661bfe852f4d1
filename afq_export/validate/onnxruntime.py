"""Checks that only ONNX Runtime needs: which kernels ran, what the standard says, whether this CPU saturates."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from afq_export.lower.onnx.float_parts import OnnxFloatParts
from afq_export.lower.onnx.ort_format import ONLY_X86
from afq_export.lower.onnx.probe import linears_model, run_linears
from afq_export.lower.onnx.program import opset_of
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.runtime.onnxruntime import OnnxSession, RunOptions
from afq_export.runtime.profile import executed
from afq_export.runtime.saturation import saturating
from afq_export.spec.report import Check
from afq_export.spec.target import TargetProfile
from afq_export.validate.cache import cache_check
from afq_export.validate.rungs import ObservedOps, integer_rung, run_block
from afq_export.validate.specification import relative_error, specified

TOKENS = 8
"""Tokens of the run that is profiled, and of the linears that the standard is asked about."""
ROUNDING = 1e-5
"""Largest difference, over the largest output, of two float32 sums in different orders."""


def runtime_checks(
    model: Path, options: RunOptions, target: TargetProfile, checkpoint: QuantizedCheckpoint, ids_T: Tensor
) -> list[Check]:
    """All of them, on the file `model` and the first tokens of the text."""
    ids_T = ids_T[:TOKENS]
    checks = [
        kernels_check(executed_kernels(model, options, ids_T), target, checkpoint),
        specification_check(options, target, checkpoint, ids_T),
        saturation_check(saturating(options.session), target, checkpoint),
    ]
    if checkpoint.kv_cache.quantized:
        parts = OnnxFloatParts(opset_of(checkpoint, target), target, options, kept=False)
        _, outputs = OnnxSession(model, options).run_both(ids_T)
        checks.append(cache_check(outputs, integer_rung(checkpoint, target, parts=parts), ids_T))
    return [*checks, ort_check(model, options, ids_T)] if target.onnx.ort_format else checks


def executed_kernels(model: Path, options: RunOptions, ids_T: Tensor) -> dict[str, str]:
    """Node name -> operator that ONNX Runtime ran for it, from its profile of one call."""
    with tempfile.TemporaryDirectory() as folder:
        session = OnnxSession(model, options, profile=Path(folder) / "profile")
        session.logits(ids_T)
        return executed(session.end_profile().read_text(encoding="utf-8"))


def ort_check(model: Path, options: RunOptions, ids_T: Tensor) -> Check:
    """model.ort, where all decisions of the optimiser are fixed, against model.onnx, where the runtime takes them.

    The .ort file is for ARM and leaves out the remedy for x86 without VNNI, so that it cannot be compared there.
    """
    without = {key: value for key, value in options.session.items() if key not in ONLY_X86}
    if saturating(without):
        return Check(name="ort file", status="skipped", detail="model.ort is for ARM; this CPU saturates without VNNI")
    theirs = OnnxSession(model.with_suffix(".ort"), options).logits(ids_T)
    same = torch.equal(OnnxSession(model, options).logits(ids_T), theirs)
    detail = f"model.ort gives {'the' if same else 'other'} logits {'of' if same else 'than'} model.onnx, bit for bit"
    return Check(name="ort file", status="passed" if same else "failed", detail=detail)


def kernels_check(ran: Mapping[str, str], target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Check:
    """Every linear ran as the operator that its kernel promises: none fell back to a float MatMul silently."""
    promised = {name: target.kernel(record.kernel).runs_as for name, record in checkpoint.records.items()}
    wrong = [
        f"{name} ran as {ran.get(name, 'nothing')} instead of {operator}"
        for name, operator in promised.items()
        if ran.get(name) != operator
    ]
    if wrong:
        return Check(name="kernels", status="failed", detail=f"{len(wrong)} linears on other kernels: {wrong[0]}")
    counts = collections.Counter(promised.values())
    what = ", ".join(f"{count} {operator}" for operator, count in counts.items())
    return Check(name="kernels", status="passed", detail=f"the runtime's profile shows {what}")


@torch.no_grad()
def specification_check(
    options: RunOptions, target: TargetProfile, checkpoint: QuantizedCheckpoint, ids_T: Tensor
) -> Check:
    """The linears of the first block, on the text: the ONNX standard against the runtime with and without fusion.

    A kernel that quantizes what the file calls float (MatMulNBits at level 4) is not what the standard says; how far it
    is from that is stated instead of checked.
    """
    rung, seen = integer_rung(checkpoint, target), {}
    run_block(rung, ObservedOps(rung.block(0), seen.__setitem__), rung.embed(ids_T[None]))
    linears = checkpoint.block(0)
    inputs = {f"{linears[role].spec.name}.x": x.numpy() for role, x in seen.items()}
    standard = specified(linears_model(list(linears.values()), target), inputs)
    arrays = {linear.spec.name: seen[role][0].numpy() for role, linear in linears.items()}
    fused = run_linears(list(linears.values()), arrays, target, options)
    errors: dict[bool, list[float]] = {True: [], False: []}
    wrong = []
    for linear in linears.values():
        expected = standard.reference[f"{linear.spec.name}.y"][0]
        meant, allowed = keeps_meaning(linear, target), tolerance(linear, float(abs(expected).max()))
        unfused = relative_error(standard.unfused[f"{linear.spec.name}.y"][0], expected)
        errors[meant].append(relative_error(fused[linear.spec.name], expected))
        if not unfused <= allowed or (meant and not errors[meant][-1] <= allowed):
            wrong.append(f"{linear.spec.name}: unfused {unfused:.1e}, fused {errors[meant][-1]:.1e}")
    detail = f"linears of block 0: ReferenceEvaluator and unfused ONNX Runtime agree to {standard.error():.1e}"
    if errors[True]:
        detail += f", {len(errors[True])} fused kernels are within {max(errors[True]):.1e} of them"
    if errors[False]:
        detail += f", {len(errors[False])} quantize their float input and are {max(errors[False]):.1e} away, as stated"
    if wrong:
        return Check(name="specification", status="failed", detail=f"{wrong[0]}; {detail}")
    return Check(name="specification", status="passed", detail=detail)


def keeps_meaning(linear: QuantizedLinear, target: TargetProfile) -> bool:
    """Whether the kernel computes what the file says, up to the order of float sums."""
    return target.kernel(linear.record.kernel).arithmetic != "onnxruntime.dynamic_per_block"


def tolerance(linear: QuantizedLinear, largest: float) -> float:
    """Allowed difference over the largest output: float rounding, or one step where the output is on a grid."""
    grid = linear.record.output
    return ROUNDING if grid is None else max(ROUNDING, 1.001 * grid.scale / max(largest, 1e-30))


def saturation_check(wrong: Mapping[str, float], target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Check:
    """`wrong`: patterns that this CPU computes wrong with the file's session options. Only those in use count."""
    used = {target.kernel(record.kernel).arithmetic.split(".")[-1] for record in checkpoint.records.values()}
    hit = {pattern: error for pattern, error in wrong.items() if pattern.split()[0] in used}
    if not hit:
        detail = "the worst case of every pattern comes out exactly on this CPU with the file's session options"
        return Check(name="saturation", status="passed", detail=detail)
    pattern, error = next(iter(hit.items()))
    detail = f"{pattern} is off by {error:.0%} on this CPU: set session.x64quantprecision = 1 in the target"
    return Check(name="saturation", status="failed", detail=detail)
