"""How much memory and time the stages take on random models of given shapes, next to what `plan` says before.

    python examples/benchmarks/scale.py write --shape 7b --out llama-7b
    python examples/benchmarks/scale.py run --model llama-7b --out run-7b -- --set samples.windows=4

`write` makes a Llama of random weights: sharded float16 safetensors, configuration, the demo model's tokenizer. `run`
calls `plan`, then every stage in a process of its own, and prints the plan beside the peak of resident memory over the
process and its children (VmHWM), the stage's CPU seconds (what it takes on a machine that does nothing else; opening
and hashing the model, which every command does, is left out) and the command's seconds. What stands behind `--` goes to
every command. With `--blocks 3` three blocks are calibrated and the others' time is extrapolated. Stopped or out of
`--minutes`, it goes on where it was when it is called again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch
from long_run import status, tree
from safetensors.torch import save_file

from afq_export.arch.config import DecoderConfig
from afq_export.load.config import read_config
from afq_export.load.model import expected_shapes
from afq_export.spec.catalog import demo_model

SHAPES = {
    # vocabulary, hidden, intermediate, blocks, heads, KV heads, tied
    "10m": (1024, 256, 1024, 8, 8, 8, True),
    "135m": (49152, 576, 1536, 30, 9, 3, True),
    "1b": (32000, 2048, 5632, 22, 32, 4, False),
    "7b": (32000, 4096, 11008, 32, 32, 32, False),
}
"""Of Llama-2-7B, of TinyLlama-1.1B, of SmolLM2-135M, and one in between it and the demo model."""
SHARD_BYTES = 2 << 30
POOL, STRIDE = (1 << 24) + 43, 1_000_003
"""Normal random numbers that all tensors are cut out of, over and over: no two rows of a tensor are the same."""
STAGES = ("calibrate", "quantize", "lower", "validate")
POLL_SECONDS = 0.2


def main() -> int:
    arguments, rest = parse()
    if arguments.action == "write":
        write(arguments.shape, arguments.blocks, Path(arguments.out), arguments.seed)
        return 0
    return run(arguments, rest)


def write(shape: str, blocks: int | None, folder: Path, seed: int) -> None:
    """A random model of the shape called `shape`, with as many `blocks` as are asked for."""
    folder.mkdir(parents=True)
    for path in demo_model("llama").glob("token*.json"):
        shutil.copyfile(path, folder / path.name)
    config = _configuration(shape, blocks)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    decoder, _ = read_config(folder)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
    _write_shards(decoder, folder, pool)


def _configuration(shape: str, blocks: int | None) -> dict:
    vocabulary, hidden, intermediate, layers, heads, kv_heads, tied = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 4096,
        "num_attention_heads": heads,
        "num_hidden_layers": blocks or layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "vocab_size": vocabulary,
    }


def _write_shards(config: DecoderConfig, folder: Path, pool: torch.Tensor) -> None:
    """One shard after the other, each at most SHARD_BYTES."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for key, shape in expected_shapes(config).items():
        size += 2 * torch.Size(shape).numel()
        if size > SHARD_BYTES:
            shards.append({})
            size = 2 * torch.Size(shape).numel()
        shards[-1][key] = shape
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: _values(key, shape, pool) for key, shape in shard.items()}, folder / name)
        where |= dict.fromkeys(shard, name)
        pool = pool.roll(STRIDE)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _values(key: str, shape: tuple[int, ...], pool: torch.Tensor) -> torch.Tensor:
    """Norms around 1, linears that keep the size of their input, out of the pool from a place that the name gives."""
    count = torch.Size(shape).numel()
    turned = pool.roll(-zlib.crc32(key.encode()) % len(pool))
    if "norm" in key:
        return (1 + 0.1 * turned[:count]).half()
    scaled = (turned * shape[-1] ** -0.5).half()
    return scaled.repeat(-(-count // len(pool)))[:count].view(shape)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Plan, stages, table. 1 when a stage failed, 3 when the time was up."""
    options = ["--model", arguments.model, "--target", arguments.target, "--recipe", arguments.recipe]
    options += ["--out", arguments.out, "--threads", str(arguments.threads), *rest]
    path = Path(f"{arguments.out}.measured.json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"stages": {}}
    if "plan" not in kept:
        before = _children_cpu()
        kept["plan"] = json.loads(_call(["plan", *options, "--json"]).stdout)
        kept["opening"] = _children_cpu() - before
    blocks, failed = kept["plan"]["blocks"], 0
    deadline = time.monotonic() + 60 * arguments.minutes
    for stage in arguments.stages.split(","):
        before = kept["stages"].get(stage, Measured())
        if before["done"]:
            continue
        few = arguments.blocks if stage == "calibrate" and arguments.blocks < blocks else 0
        marks = [_block(arguments.out, index) for index in range(few)]
        given = [arguments.out, "--threads", str(arguments.threads)] if stage == "validate" else options
        found, seen = _measured([stage, *given], deadline, marks)
        found["cpu"] = round(max(0.0, found["cpu"] - kept["opening"]), 1)
        if few and len(seen) == few:
            found = _extrapolated(found, arguments.out, seen, kept["opening"], blocks)
        kept["stages"][stage] = _added(before, found)
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        if not found["done"]:
            failed = 3 if time.monotonic() > deadline else 1
            break
    print(table(kept["plan"], kept["stages"]))
    return failed


class Measured(dict):
    """`seconds` of the command, `cpu` seconds of the stage alone, `peak_mb`, and whether it is `done`."""

    def __init__(self, seconds: float = 0.0, cpu: float = 0.0, peak_mb: float = 0.0, done: bool = False) -> None:
        super().__init__(seconds=round(seconds, 1), cpu=round(cpu, 1), peak_mb=round(peak_mb), done=done)


def _added(one: Measured, other: Measured) -> Measured:
    seconds, cpu = (one[key] + other[key] for key in ("seconds", "cpu"))
    return Measured(seconds, cpu, max(one["peak_mb"], other["peak_mb"]), other["done"])


def _block(out: str, index: int) -> Path:
    return Path(out) / "calibration" / f"block-{index:03d}.safetensors"


def _extrapolated(found: Measured, out: str, seen: list[float], opening: float, blocks: int) -> Measured:
    """All blocks, when a few were calibrated whose files came after `seen` CPU seconds: all that follow take as long as
    those after the first. The last one's result is put in place of the others', which no figure depends on."""
    few = len(seen)
    for index in range(few, blocks):
        shutil.copyfile(_block(out, few - 1), _block(out, index))
    cpu = seen[0] - opening + (seen[-1] - seen[0]) / (few - 1) * (blocks - 1)
    return Measured(0.0, cpu, found["peak_mb"], True)


def table(planned: dict, stages: dict) -> str:
    """Markdown: what was said and what was seen."""
    lines = [
        f"{planned['parameters']:,} parameters, {planned['blocks']} blocks of width {planned['hidden']}, "
        f"{planned['recipe']}, {planned['calibration']}, {planned['time']['gflops']['float32']:.0f} GFLOP/s",
        "",
        "| stage | plan MB | peak MB | plan / seen | plan s | CPU s | plan / seen | s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for stage, seen in stages.items():
        memory, seconds = planned["memory"].get(stage), planned["time"].get(stage)
        cells = *_compared(memory, seen["peak_mb"], 0), *_compared(seconds, seen["cpu"], 1), f"{seen['seconds']:.0f}"
        lines.append(f"| {stage}{'' if seen['done'] else ' (stopped)'} | {' | '.join(cells)} |")
    said, seen = sum(planned["time"].get(stage, 0.0) for stage in stages), sum(s["cpu"] for s in stages.values())
    cells = *_compared(said, seen, 1), f"{sum(s['seconds'] for s in stages.values()):.0f}"
    lines.append(f"| all | | | | {' | '.join(cells)} |")
    return "\n".join(lines)


def _compared(said: float | None, seen: float, digits: int) -> tuple[str, str, str]:
    """Plan, seen and their ratio."""
    if said is None:
        return "-", f"{seen:.{digits}f}", "-"
    return f"{said:.{digits}f}", f"{seen:.{digits}f}", f"{said / seen:.2f}" if seen > 10**-digits else "-"


def _call(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([*_program(), *arguments], stdout=subprocess.PIPE, text=True, check=True)


def _program() -> list[str]:
    return [sys.executable, "-m", "afq_export"]


def _measured(arguments: list[str], deadline: float, marks: list[Path]) -> tuple[Measured, list[float]]:
    """What a command takes, and after how many CPU seconds the files `marks` were there; then it is stopped."""
    start, cpu, peak, seen = time.monotonic(), _children_cpu(), 0.0, []
    process = subprocess.Popen([*_program(), *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, tree_peak_mb(process.pid))
        seen += [_cpu(process.pid) for path in marks[len(seen) :] if path.exists()]
        if (marks and len(seen) == len(marks)) or time.monotonic() > deadline:
            process.terminate()
            process.wait()
        time.sleep(POLL_SECONDS)
    seconds, cpu = time.monotonic() - start, _children_cpu() - cpu
    return Measured(seconds, cpu, peak, process.returncode == 0), seen


def _cpu(pid: int) -> float:
    """CPU seconds of a running process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children_cpu() -> float:
    """CPU seconds of all ended children: what a stage takes on a machine that does nothing else."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tree_peak_mb(pid: int) -> float:
    """Sum of the largest resident memories of a process and its children, as they are now (Linux)."""
    return sum(status(process).get("VmHWM", 0) for process in tree(pid)) * 1024 / 1e6


def parse() -> tuple[argparse.Namespace, list[str]]:
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    writer = actions.add_parser("write", help="a random model")
    writer.add_argument("--shape", choices=SHAPES, default="10m")
    writer.add_argument("--blocks", type=int, help="fewer or more blocks than the shape has")
    writer.add_argument("--out", required=True)
    writer.add_argument("--seed", type=int, default=0)
    runner = actions.add_parser("run", help="plan and stages, measured")
    runner.add_argument("--model", required=True)
    runner.add_argument("--out", required=True)
    runner.add_argument("--target", default="linux-x64-ort")
    runner.add_argument("--recipe", default="w4a8-g32+rtn")
    runner.add_argument("--stages", default=",".join(STAGES))
    runner.add_argument("--threads", type=int, default=1)
    runner.add_argument("--blocks", type=int, default=0, help="calibrate that many, at least 2, and extrapolate")
    runner.add_argument("--minutes", type=float, default=600.0)
    arguments = parser.parse_args(own)
    if getattr(arguments, "blocks", 0) == 1 and arguments.action == "run":
        runner.error("argument --blocks: one block does not show what those after the first take; at least 2")
    return arguments, rest


if __name__ == "__main__":
    sys.exit(main())
