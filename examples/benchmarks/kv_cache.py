"""What a quantized KV cache costs and saves: one set of integers, lowered with caches of 32, 8 and 4 bits.

    python examples/benchmarks/kv_cache.py --model SmolLM2-135M-Instruct.Q4_1.gguf --target linux-x64-ort \
        --recipe w8a8-dynamic+rtn --eval wiki.test.raw --windows 12 --out afq-out/kv-cache

The model is calibrated and quantized once; the three programs differ in their caches alone. Perplexity is each
finished file's in its runtime, every window from an empty cache, in calls of the target's prefill. Behind it the ratio
to the float cache's, with the standard error of the windows' paired differences. *cache* is 1,000 tokens; *decode* is
the processor's time for a step that follows 256 tokens, the least of three rounds of 16 steps, one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
import time
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from afq_export.backends import backend
from afq_export.guard.compare import paired
from afq_export.job import Job, resolve
from afq_export.lower.bundle import new_manifest, seal
from afq_export.machine import settle
from afq_export.pipeline import open_folder, run_calibrate, run_quantize
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.quantize.cache import token_bytes
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.report.tables import Table, size_mb
from afq_export.runtime.session import Session
from afq_export.spec.recipe import KvCache
from afq_export.spec.request import Request
from afq_export.validate.evaluate import TokenStats, measure_one

PAST, STEPS, ROUNDS = 256, 16, 3


def main() -> None:
    arguments = parse()
    caches = [KvCache(*map(int, text.split("g"))) for text in arguments.cache]
    job = resolve(request(arguments))
    for cache in caches:  # what the target does not take is refused before any work
        assign(job.model.config, msgspec.structs.replace(job.recipe, kv_cache=cache), job.target)
    settle(job.threads)
    with open_folder(job) as folder:
        checkpoint = run_quantize(job, folder, run_calibrate(job, folder, silent), silent)
    rows, first = [], None
    for cache in caches:
        with tempfile.TemporaryDirectory(dir=job.out) as place:
            session = lowered(job, dataclasses.replace(checkpoint, kv_cache=cache), Path(place))
            stats = measure_one(session, job.evaluation.ids_NT)
            step = decode_seconds(session, job.evaluation.ids_NT[0])
        first = first or stats
        per_token = token_bytes(cache, job.model.config)
        name = f"{cache.bits}{f' g{cache.group}' if cache.group else ''}"
        size = size_mb(1000 * per_token)
        rows.append((name, f"{stats.perplexity.value:.4f}", drift(stats, first), size, f"{1e3 * step:.2f} ms"))
        print(*rows[-1], flush=True)
    windows, window = job.evaluation.ids_NT.shape
    print(f"\n{job.model.name}, {job.recipe.name}, {job.target.name}, {windows} windows of {window} tokens\n")
    header = ("cache bits", "perplexity", "over float cache", "cache per 1,000 tokens", "decode")
    print(Table(header, tuple(rows), frozenset(range(1, 5))).markdown())


def request(arguments: argparse.Namespace) -> Request:
    return Request(
        target=arguments.target,
        model=arguments.model,
        recipe=arguments.recipe,
        changes=tuple(arguments.set),
        calib=arguments.calib,
        eval=arguments.eval,
        out=arguments.out,
        window=arguments.window,
        eval_windows=arguments.windows,
        threads=1,
    )


def lowered(job: Job, checkpoint: QuantizedCheckpoint, folder: Path) -> Session:
    """The program of `checkpoint` in its runtime, written to `folder`."""
    chosen = backend(job.target.backend)
    chosen.write(checkpoint, job.target, folder, job.calibration.ids_NT[0, :8], {}, silent)
    manifest = new_manifest(job.model, job.recipe, job.target, chosen.PROGRAM, {}, job.request.seed, [])
    return chosen.open_session(seal(folder, manifest))


def drift(stats: TokenStats, first: TokenStats) -> str:
    """The perplexity over that of `first`, and the standard error of the difference."""
    if len(stats.nll) < 2:
        return f"{stats.perplexity.value / first.perplexity.value - 1:+.3%}"
    apart = paired(stats.nll.numpy(), first.nll.numpy())
    return f"{math.expm1(apart.mean):+.3%} (±{apart.stderr:.3%})"


def decode_seconds(session: Session, ids_T: Tensor) -> float:
    past = min(PAST, len(ids_T) - STEPS)
    found = []
    for _ in range(ROUNDS):
        session.logits(ids_T[:past])
        start = time.process_time()
        for position in range(past, past + STEPS):
            session.extend(ids_T[position : position + 1], position)
        found.append((time.process_time() - start) / STEPS)
    return min(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-llama")
    parser.add_argument("--target", default="linux-x64-ort")
    parser.add_argument("--recipe", default="w8a8-dynamic+rtn")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--calib")
    parser.add_argument("--eval")
    parser.add_argument("--window", type=int)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--out", default="afq-out/kv-cache")
    parser.add_argument("--cache", nargs="+", default=["32", "8", "4"], help="bits, or bits and group: 4g32")
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
