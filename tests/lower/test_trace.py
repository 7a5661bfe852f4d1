"""The runtime's own trace of a call: which kernels really ran."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from afq_export.lower.executorch.program import lower_program
from afq_export.progress import silent
from afq_export.runtime.library import load_runtime, quiet
from tests.checkpoints import random_checkpoint, small_config
from tests.lower.reference import TARGET

EXPECTED = {
    "qd8-f32-qc8w": r"Fully Connected \(NC, QD.?8, F32, QC8W\)",
    "qd8-f32-qc4w": r"Fully Connected \(NC, QD.?8, F32, QC4W\)",
    "qd8-f32-qb4w": r"Fully Connected \(NC, QD.?8, F32, QB4W\)",
    "qs8-qc8w": r"Fully Connected \(NC, QS8, QC8W\)",
}
"""Kernel -> XNNPACK's name of it; instruction sets with unsigned dot products call dynamic activations QDU8."""


@pytest.mark.parametrize("kernel", EXPECTED)
def test_the_integer_kernels_run(kernel: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(layers=1), kernel)
    names = trace(lower_program(checkpoint, TARGET, silent).pte, tmp_path / "trace.etdp")
    linears = [name for name in names if name.startswith("Fully Connected")]
    wanted = [name for name in linears if re.match(EXPECTED[kernel], name)]
    heads = [name for name in linears if re.match(EXPECTED["qd8-f32-qc8w"], name)]
    assert len(linears) == 8, "seven linears of the block and lm_head"
    assert len(wanted) == (8 if kernel == "qd8-f32-qc8w" else 7)
    assert len(wanted + heads) >= 8, linears


def trace(pte: bytes, path: Path) -> list[str]:
    """Names of everything that one call of six tokens ran, inside delegates and outside."""
    module = load_runtime()._load_for_executorch_from_buffer(pte, enable_etdump=True)
    module.forward([torch.arange(6)[None], torch.tensor([0])])
    module.write_etdump_result_to_file(str(path))
    with quiet():
        from executorch.devtools import Inspector

        events = [event for block in Inspector(etdump_path=str(path)).event_blocks for event in block.events]
    return [event.name for event in events if event.name]
