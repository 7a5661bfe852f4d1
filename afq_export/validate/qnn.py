"""Checks that only Qualcomm programs need: that nothing runs outside of the HTP, and how far its operators are off.

Every operator of the prefill graph runs on the HTP with its result shown; each result is held to what the file says,
float64 between the grids, on the very codes that the HTP gave it to work on. So errors do not add up, and the operator
that is wrong is the one that is named. The differences are in steps of the operator's own grid; how many are allowed
stands in the target file (`qnn.operator_steps`), for its HTP architecture.
"""

from __future__ import annotations

import collections
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from afq_export.lower.qnn.show import ShownGraph, shown_graph
from afq_export.runtime.qnn import open_model, read_host_file
from afq_export.runtime.qnn_session import QnnSession
from afq_export.spec.report import Check
from afq_export.spec.target import TargetProfile


@dataclasses.dataclass(frozen=True)
class Steps:
    """Differences of one kind of operator, in steps: the largest, the mean size, the mean."""

    largest: float
    mean: float
    bias: float
    operators: int


def runtime_checks(folder: Path, target: TargetProfile, ids_T: Tensor) -> list[Check]:
    """`kernels`: all of it on the HTP, compiled as the graph says; `operators`: every operator within its steps."""
    return [_kernels_check(folder, ids_T), _operators_check(folder, target, ids_T)]


def _kernels_check(folder: Path, ids_T: Tensor) -> Check:
    """The compiled contexts give the very codes of the graphs; neither loads if a node would be left to the CPU."""
    sessions = [QnnSession(folder, compiled=compiled) for compiled in (True, False)]
    tokens, wrong = 0, []
    for name in ("prefill", "decode"):
        ids = ids_T[tokens : tokens + min(sessions[0].prefill, len(ids_T) - 1)] if not tokens else ids_T[-1:]
        compiled, graph = (session.run(name, session.feed(name, ids.numpy())) for session in sessions)
        wrong += [f"{name}: {key}" for key in graph if not np.array_equal(graph[key], compiled[key])]
        for session in sessions:
            session.extend(ids, tokens)
        tokens += len(ids)
    detail = (
        "no operator outside of the HTP (CPU fallback is disabled); compiled contexts equal the graphs code for code"
    )
    if wrong:
        detail = f"the compiled context gives other codes than the graph, first {wrong[0]}"
    return Check(name="kernels", status="failed" if wrong else "passed", detail=detail)


def _operators_check(folder: Path, target: TargetProfile, ids_T: Tensor) -> Check:
    found = operator_steps(folder, ids_T)
    allowed = target.qnn.steps(read_host_file(folder).steps["prefill"].inputs["hidden"].bits)
    wrong = [kind for kind, steps in found.items() if steps.largest > allowed.get(kind, 0)]
    figures = ", ".join(f"{kind} {steps.largest:.0f} (mean {steps.mean:.2f})" for kind, steps in found.items())
    detail = f"largest difference from the file's own arithmetic, in steps of each grid: {figures}"
    if wrong:
        detail = f"{wrong[0]} is off by {found[wrong[0]].largest:.0f}, allowed {allowed.get(wrong[0], 0)}; {detail}"
    return Check(name="operators", status="failed" if wrong else "passed", detail=detail)


def operator_steps(folder: Path, ids_T: Tensor) -> dict[str, Steps]:
    """Differences by kind of operator, over the prefill graph on the first tokens of `ids`."""
    session, options = QnnSession(folder), read_host_file(folder)
    feed = session.feed("prefill", ids_T[: session.prefill].numpy())
    shown = shown_graph(folder / "prefill.onnx")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "shown.onnx"
        path.write_bytes(shown.model)
        results = open_model(path, options).run(list(shown.outputs), feed)
    codes = feed | dict(zip(shown.outputs, results, strict=True))
    return summary(differences(shown, codes))


def differences(shown: ShownGraph, codes: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Codes of the HTP minus those of the file's arithmetic, by kind of operator."""
    known, found = dict(codes), collections.defaultdict(list)
    for step in shown.steps:
        if step.kind in MOVES:
            known[step.codes] = MOVES[step.kind](step, [known[name] for name in step.sources])
            continue
        values = [shown.value(name, known) for name in step.inputs]
        expected = step.grid.codes(OPERATORS[step.operator](values, step.attributes))
        found[step.kind].append(known[step.codes].astype(np.int64) - expected.astype(np.int64))
    return dict(found)


def summary(found: Mapping[str, list[np.ndarray]]) -> dict[str, Steps]:
    """`found` in figures, the kinds in order of their names."""
    joined = {kind: np.concatenate([part.ravel() for part in parts]) for kind, parts in sorted(found.items())}
    return {
        kind: Steps(float(abs(all_).max()), float(abs(all_).mean()), float(all_.mean()), len(found[kind]))
        for kind, all_ in joined.items()
    }


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


OPERATORS: dict[str, Callable[[list[np.ndarray], Mapping], np.ndarray]] = {
    "MatMul": lambda x, _: x[0] @ x[1],
    "Add": lambda x, _: x[0] + x[1],
    "Mul": lambda x, _: x[0] * x[1],
    "Sigmoid": lambda x, _: 1 / (1 + np.exp(-x[0])),
    "Relu": lambda x, _: np.maximum(x[0], 0),
    "Softmax": lambda x, _: _softmax(x[0]),
    "RMSNormalization": lambda x, attributes: _rms_norm(*x, attributes["epsilon"]),
    "QuantizeLinear": lambda x, _: x[0],
}
"""float64 in and out. QuantizeLinear alone: the same tensor on another grid."""
MOVES: dict[str, Callable] = {
    "Reshape": lambda step, x: x[0].reshape(step.constants[0]),
    "Transpose": lambda step, x: x[0].transpose(step.attributes["perm"]),
    "Slice": lambda step, x: x[0][..., int(step.constants[0][0]) : int(step.constants[1][0])],
    "Concat": lambda step, x: np.concatenate(x, step.attributes["axis"]),
}
"""What moves codes without changing one."""
