"""Tensors that are written beside the graph leave memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.machine import resident_mb

TENSORS, BYTES = 20, 8_000_000


def test_tensors_beside_the_graph_leave_memory(tmp_path: Path) -> None:
    """What protobuf clears stays in the message's arena: a 7B model's file was in memory whole."""
    graph = OnnxGraph(beside=tmp_path / "tensors")
    before = resident_mb()
    for number in range(TENSORS):
        graph.tensor(f"tensor {number}", np.full(BYTES, number, np.uint8))
    assert (tmp_path / "tensors").stat().st_size >= TENSORS * BYTES
    assert resident_mb() - before < TENSORS * BYTES / 1e6 / 2
    assert all(not tensor.raw_data and tensor.external_data for tensor in graph.initializers.values())
