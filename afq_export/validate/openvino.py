"""Checks that only OpenVINO needs: what its plugin made of the linears, and whether the properties hold."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.runtime.openvino import OpenvinoSession, RanNode, RunOptions
from afq_export.spec.report import Check
from afq_export.spec.target import TargetProfile

TOKENS = 8
"""Tokens of the call after which the compiled program is looked at."""


def runtime_checks(
    model: Path, options: RunOptions, target: TargetProfile, checkpoint: QuantizedCheckpoint, ids_T: Tensor
) -> list[Check]:
    """All of them, on the program `model` and the first tokens of the text."""
    session = OpenvinoSession(model, options)
    session.logits(ids_T[:TOKENS])  # shapes are dynamic: the plugin chooses its kernels when it sees the first ones
    return [kernels_check(session.nodes(), target, checkpoint)]


def ran_as(ran: Mapping[str, RanNode], name: str) -> RanNode:
    """The node of a linear, which is known by its last operator: a bias goes into the same node."""
    return ran.get(f"{name}.biased", ran.get(name, RanNode("nothing", "", "")))


def kernels_check(ran: Mapping[str, RanNode], target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Check:
    """Every linear runs as a compressed FullyConnected: weights neither widened to float nor left to another kernel."""
    wrong, counts = [], collections.Counter()
    for name, record in checkpoint.records.items():
        kernel = target.kernel(record.kernel)
        promised, node = (kernel.runs_as, f"i{kernel.stored_bits}"), ran_as(ran, name)
        if (node.type, node.precision) != promised:
            wrong.append(f"{name} ran as {node.type} {node.precision} instead of {' '.join(promised)}")
        counts[f"{node.type} {node.precision} {node.kernel}"] += 1
    if wrong:
        return Check(name="kernels", status="failed", detail=f"{len(wrong)} linears on other kernels: {wrong[0]}")
    what = ", ".join(f"{count} {kernel}" for kernel, count in counts.items())
    return Check(name="kernels", status="passed", detail=f"the compiled program has {what}")
