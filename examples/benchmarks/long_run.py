"""One process that exports a model to several targets, again and again, its memory sampled once a second.

    python examples/benchmarks/long_run.py --model MODEL.gguf --calib TEXT --eval TEXT --rounds 3

What is counted is the resident memory of the process and of everything that it starts, summed: all of it for the peak,
which `plan` must have promised, and the anonymous part (what the program holds itself, no mapped files) for growth.
Exit code 1 when a run takes more than the plan said and its accuracy allows, or when the last round leaves more behind
than the second did. The first round is not compared: it imports the runtimes, fills their caches. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from afq_export.cli import call

ACCURACY = 1.2
"""How far the memory that `plan` says may be exceeded."""
GROWTH_MB = 24.0
"""What a round may leave behind more than an earlier one: fragments of the allocator, in either direction."""
STAGES = ("calibrate", "quantize", "lower", "validate")
TARGETS = ("android-xnnpack", "linux-x64-ort", "android-ort")


def status(pid: int) -> dict[str, int]:
    """What /proc says of the memory of `pid`, kB by name; nothing when it has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        fields = (line.split(":", 1) for line in lines if line.endswith(" kB"))
        return {name: int(value.split()[0]) for name, value in fields}
    return {}


def tree(pid: int, parent: tuple[int | None, ...] = ()) -> Iterator[int]:
    """`pid` and all its descendants that are there, and have memory of their own: between vfork and exec a child is in
    that of its `parent`."""
    fields = status(pid)
    own = fields.get("VmPeak"), fields.get("VmHWM")
    if own != parent:
        yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="utf-8").split():
                yield from tree(int(child), own)


def memory(pid: int) -> tuple[float, float]:
    """(resident, its anonymous part) of the tree of `pid`, MB."""
    found = [status(process) for process in tree(pid)]
    resident, anonymous = (sum(fields.get(name, 0) for fields in found) for name in ("VmRSS", "RssAnon"))
    return resident * 1024 / 1e6, anonymous * 1024 / 1e6


class Sampler(threading.Thread):
    """Takes `memory` of this process every `seconds`; `peak` is the largest since `start_over`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self.seconds, self.samples, self.peak = seconds, 0, 0.0

    def run(self) -> None:
        while True:
            self.peak, self.samples = max(self.peak, memory(os.getpid())[0]), self.samples + 1
            time.sleep(self.seconds)

    def start_over(self) -> None:
        self.peak = memory(os.getpid())[0]


def ask(arguments: Sequence[str]) -> dict:
    """What `afq-export ... --json` answers. Raises SystemExit with what it says when it does not work."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = call([*arguments, "--json"])
    if code not in (0, 1):  # 1: a verdict, which is not what is asked here
        raise SystemExit(f"{' '.join(arguments)}: exit code {code}")
    return json.loads(out.getvalue())


def one_run(target: str, options: Sequence[str], folder: Path, sampler: Sampler) -> dict[str, float]:
    """A run from nothing: what the plan said of a fresh process, the peak, what is held afterwards (MB), seconds."""
    before = memory(os.getpid())[1]
    shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    sampler.start_over()
    report = ask(["run", "--target", target, "--out", str(folder), *options])
    peak, seconds = sampler.peak, time.monotonic() - start
    gc.collect()
    assert report["verdict"], "a finished run"
    return {"before": before, "peak": peak, "after": memory(os.getpid())[1], "seconds": seconds}


def main(given: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", metavar="NAME", help=f"default: {', '.join(TARGETS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="between two samples")
    options, rest = parser.parse_known_args(given)
    targets = options.target or list(TARGETS)
    sampler = Sampler(options.seconds)
    sampler.start()
    with tempfile.TemporaryDirectory() as scratch:
        plans = {t: ask(["plan", "--target", t, "--out", f"{scratch}/run", *rest])["memory"] for t in targets}
        promised = {t: max(said.get(stage, 0.0) for stage in STAGES) for t, said in plans.items()}
        rows, left = [], []
        print("| round | target | s | peak, MB | plan, MB | held after it, MB |")
        print("| ---: | --- | ---: | ---: | ---: | ---: |")
        for number in range(1, options.rounds + 1):
            for target in targets:
                row = one_run(target, rest, Path(scratch) / "run", sampler)
                rows.append((target, row))
                numbers = (row["peak"], promised[target], row["after"])
                cells = " | ".join(f"{value:.0f}" for value in numbers)
                print(f"| {number} | `{target}` | {row['seconds']:.0f} | {cells} |", flush=True)
            left.append(rows[-1][1]["after"])
    over = sorted({target for target, row in rows if row["peak"] > ACCURACY * promised[target]})
    growth = left[-1] - left[1] if len(left) > 2 else 0.0
    print(f"\n{sampler.samples} samples; held after each round: {', '.join(f'{mb:.0f}' for mb in left)} MB")
    print(f"growth from the second round to the last: {growth:+.0f} MB, allowed {GROWTH_MB:.0f}")
    print(f"over the plan: {', '.join(over) or 'none'}")
    return int(bool(over) or growth > GROWTH_MB)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
