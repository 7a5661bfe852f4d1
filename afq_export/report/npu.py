"""What an NPU's compiler estimates, as a table and in a sentence."""

from __future__ import annotations

import re

from afq_export.report.tables import Table
from afq_export.spec.report import NpuEstimate, NpuLayer

BLOCK = re.compile(r"blocks\.\d+\.")


def npu_table(estimate: NpuEstimate) -> Table:
    """One row per kind of layer, those of all blocks together: how many, cycles, share, MACs, largest SRAM."""
    kinds: dict[str, list[NpuLayer]] = {}
    for layer in estimate.layers:
        kinds.setdefault(BLOCK.sub("blocks.*.", layer.name), []).append(layer)
    total = sum(layer.cycles for layer in estimate.layers) or 1
    rows = []
    for kind, layers in kinds.items():
        cycles = sum(layer.cycles for layer in layers)
        macs, sram = sum(layer.macs for layer in layers), max(layer.sram_bytes for layer in layers)
        rows.append((kind, str(len(layers)), f"{cycles:,}", f"{cycles / total:.1%}", f"{macs:,}", f"{sram / 1024:.0f}"))
    header = ("layer", "times", "cycles", "share", "MACs", "SRAM, KiB")
    return Table(header, tuple(rows), frozenset(range(1, len(header))))


def npu_title(estimate: NpuEstimate) -> str:
    """What the section is about."""
    return f"Estimate of the NPU's compiler: {call_of(estimate)}"


def call_of(estimate: NpuEstimate) -> str:
    """How many tokens a call takes."""
    return f"a call of {estimate.tokens} token{'s' * (estimate.tokens > 1)}"


def npu_sentence(estimate: NpuEstimate) -> str:
    """The whole call, and what the figures are worth."""
    memory = f"SRAM {estimate.sram_bytes / 1024:,.0f} KiB, flash {estimate.flash_bytes / 1024:,.0f} KiB"
    if estimate.dram_bytes:
        memory += f", DRAM {estimate.dram_bytes / 1024:,.0f} KiB"
    outside = sum(estimate.outside.values())
    return (
        f"{estimate.compiler} for {estimate.accelerator} ({estimate.system_config}, {estimate.memory_mode}, "
        f"{estimate.clock_hz / 1e6:,.0f} MHz): {estimate.cycles:,} cycles, {estimate.seconds * 1e3:.2f} ms, "
        f"{memory}; {estimate.operators - outside} of {estimate.operators} operators on the NPU. These are the "
        "compiler's estimates: the command stream was not executed here. A layer fused with the next counts there."
    )
