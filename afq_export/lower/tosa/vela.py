"""Compiles a TOSA program for an Ethos-U with Arm's Vela, in a process of its own: it prints, and may abort.

command stream   what ExecuTorch's Ethos-U runtime takes: commands, packed weights, sizes and places of the tensors
estimate         Vela's own figures: cycles and memory, of the whole and of each layer. Nothing here executes them.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from afq_export.errors import InputError, MissingToolError
from afq_export.extras import ETHOS_U
from afq_export.lower.tosa.graph import TosaGraph
from afq_export.spec.report import NpuEstimate, NpuLayer
from afq_export.spec.target import EthosUOptions

SCRIPT = """
import importlib.util, pathlib, sys
folder, *flags = sys.argv[1:]
(package,) = importlib.util.find_spec("executorch").submodule_search_locations
path = pathlib.Path(package) / "backends/arm/arm_vela.py"
spec = importlib.util.spec_from_file_location("arm_vela", path)
sys.modules["arm_vela"] = arm_vela = importlib.util.module_from_spec(spec)
spec.loader.exec_module(arm_vela)
folder = pathlib.Path(folder)
result = arm_vela.vela_compile((folder / "in.tosa").read_bytes(), flags, intermediate_path=str(folder))
(folder / "stream.bin").write_bytes(result.processed_bytes)
"""
"""ExecuTorch's own packing of Vela's result, loaded without its package, which loads torch and takes seconds."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What Vela made of a program."""

    stream: bytes
    estimate: NpuEstimate


def require_vela() -> None:
    """Raises MissingToolError without Vela."""
    if importlib.util.find_spec("ethosu") is None:
        raise MissingToolError("Ethos-U programs need Arm's Vela", why="no Python module ethosu", do=ETHOS_U)


def compile_tosa(program: bytes, options: EthosUOptions, graph: TosaGraph, tokens: int) -> Compiled:
    """The command stream for `program`, which is `graph` for calls of `tokens` tokens.

    Raises MissingToolError without Vela, InputError when it refuses.
    """
    require_vela()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.tosa").write_bytes(program)
        flags = [
            f"--accelerator-config={options.accelerator}",
            "--config=Arm/vela.ini",
            "--output-format=raw",
            f"--system-config={options.system_config}",
            f"--memory-mode={options.memory_mode}",
            "--verbose-performance",
        ]
        command = [sys.executable, "-c", SCRIPT, str(folder), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (folder / "stream.bin").is_file():
            said = (done.stderr or done.stdout).strip().splitlines()
            raise InputError("Vela refuses the program", where=options.accelerator, why=said[-1] if said else "")
        output = folder / "output"
        summary = _rows(next(output.glob("*_summary_*.csv")))[0]
        layers = _rows(next(output.glob("*_per-layer.csv")))
        return Compiled((folder / "stream.bin").read_bytes(), _estimate(summary, layers, options, graph, tokens))


def layer_of(name: str) -> str:
    """The part of the model that an operator called `name` belongs to: `blocks.0.q_proj`, `lm_head`."""
    parts = re.sub(r"(_copy|_reducesum|_propagated_reshape|_int\d+|/.*)+$", "", name).split(".")
    if parts[0].startswith("#"):
        return "unnamed"
    if parts[0] == "new":
        return f"blocks.{parts[1]}.attention"
    if parts[0] == "logits":
        return "lm_head"
    return ".".join(parts[:3]) if parts[0] == "blocks" else parts[0]


def _estimate(
    summary: dict[str, str], rows: Iterable[dict[str, str]], options: EthosUOptions, graph: TosaGraph, tokens: int
) -> NpuEstimate:
    layers: dict[str, NpuLayer] = {}
    outside: dict[str, int] = {}
    operators = 0
    for row in rows:
        operators += 1
        if row["Target"] != "NPU":
            outside[row["Original Operator"]] = outside.get(row["Original Operator"], 0) + 1
        name = layer_of(row["Name"])
        before = layers.get(name, NpuLayer(name, 0, 0, 0))
        layers[name] = NpuLayer(
            name,
            before.cycles + round(float(row["Op Cycles"])),
            before.macs + round(float(row["MAC Count"])),
            max(before.sram_bytes, round(float(row["Staging Usage"]))),
        )
    order: dict[str, int] = {}
    for index, operator in enumerate(graph.operators):
        order.setdefault(layer_of(operator.output), index)
    flash = sum(float(summary[key]) for key in ("on_chip_flash_memory_used", "off_chip_flash_memory_used"))
    return NpuEstimate(
        compiler="Vela",
        tokens=tokens,
        accelerator=options.accelerator,
        system_config=options.system_config,
        memory_mode=options.memory_mode,
        clock_hz=float(summary["core_clock"]),
        cycles=round(float(summary["cycles_total"])),
        seconds=float(summary["inference_time"]),
        macs=round(float(summary["nn_macs"])),
        sram_bytes=round(1024 * float(summary["sram_memory_used"])),
        dram_bytes=round(1024 * float(summary["dram_memory_used"])),
        flash_bytes=round(1024 * flash),
        operators=operators,
        outside=outside,
        layers=tuple(layers[name] for name in sorted(layers, key=lambda name: order.get(name, -1))),
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
