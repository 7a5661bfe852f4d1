"""The paper's comparison on small models: every figure is the exported file's, measured through its runtime.

    python examples/paper/reproduce.py --out afq-out/paper --model stories260K --model demo-llama --model demo-opt
    python examples/paper/reproduce.py --out afq-out/paper --model SmolLM2-135M --smollm2 FILE.gguf
    python examples/paper/reproduce.py --out afq-out/paper --model stories260K --sweep
    python examples/paper/figures.py afq-out/paper                    # results.json, the tables and both figures

One run is one model, scheme and method: calibrate, fold, quantize, lower, then the perplexity of model.onnx in ONNX
Runtime. What is done is not done again; a run that was stopped goes on at its block. All runs of a model see the same
calibration windows and are measured on the same tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from afq_export import pipeline
from afq_export.errors import AfqError, InputError
from afq_export.files import write_text
from afq_export.job import resolve
from afq_export.perplexity import open_subject, windows_for
from afq_export.progress import silent
from afq_export.spec.report import History, Perplexity
from afq_export.spec.request import Request
from afq_export.spec.strict import Data
from afq_export.validate.evaluate import TokenStats, measure_one

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
CORPORA = ROOT / "examples" / "benchmarks" / "corpora"
TARGET = "linux-x64-ort"
SCHEMES = ("w4a4", "w3a16", "w3a16-g128", "w2a16-g64", "w4a16")

PAPER = (
    "learning.loss=mse",
    "learning.schedule=constant",
    "learning.learning_rate=5e-3",
    "learning.clipping_rate=1e-2",
    "learning.batch=4",
    "transforms.start=smoothquant",
)
"""The paper's loss, learning rates and start, where our own methods have others."""

METHODS = {
    "round-to-nearest": "rtn",
    "SmoothQuant": "smoothquant",
    "AWQ-style": "awq",
    "OmniQuant": "omniquant",
    "AffineQuant": "affinequant",
}
"""Name -> method of calib/recipes/methods, in the expected order, the worst first."""
LEARNED = {"OmniQuant": (*PAPER, "transforms.q_to_k=diagonal"), "AffineQuant": PAPER}
"""What is changed in those that learn. AffineQuant is OmniQuant with matrices where they fold: with a stability factor
of 0 they are the same, but for the scaled rotations that RoPE lets between q and k, which no factor damps."""

SWEEP = (0.0, 1e-3, 1e-2, 0.1, 0.3, 1.0)
"""Stability factors of the sweep (the paper's figure 6)."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, its texts, how many windows of how many tokens it is measured on, and what its calibration may cost:
    `samples` for all methods, `learning` for those that learn."""

    model: str
    calib: str | None
    eval: str | None
    window: int
    windows: int
    samples: tuple[str, ...]
    learning: tuple[str, ...]


class Row(Data, kw_only=True):
    """One run: the exported file's perplexity, its loss in every window, and how its calibration went."""

    model: str
    scheme: str
    method: str
    stability_factor: float | None = None
    seed: int = 0
    changes: tuple[str, ...] = ()
    perplexity: Perplexity
    window_nll: tuple[float, ...]
    bytes: int = 0
    kernels: tuple[str, ...] = ()
    calibration: tuple[History, ...] = ()
    seconds: float = 0.0


def settings(smollm2: str) -> dict[str, Setting]:
    """Name -> setting. The text of stories260K and WikiText-2 lie beside the checkout (see examples/benchmarks)."""
    halves = tuple(str(CORPORA / f"tinystories-{half}-half.toml") for half in ("first", "second"))
    wiki = tuple(str(DATA / "wikitext2-raw" / f"wiki.{part}.raw") for part in ("valid", "test"))
    small = ("samples.windows=48", "samples.length=128"), ("learning.epochs=10",)
    large = ("samples.windows=8", "samples.length=512"), ("learning.epochs=4", "learning.autocast=bfloat16")
    return {
        "stories260K": Setting(str(DATA / "stories260K"), *halves, 512, 20, *small),
        "demo-llama": Setting("demo-llama", None, None, 256, 20, *small),
        "demo-opt": Setting("demo-opt", None, None, 256, 20, *small),
        "SmolLM2-135M": Setting(smollm2, *wiki, 512, 16, *large),
    }


def main() -> int:
    """Makes what is missing. Exit code 1 when a run ended with an error, which is printed."""
    arguments = parse()
    failed = 0
    for name in arguments.model:
        setting = settings(arguments.smollm2)[name]
        failed |= said(name, lambda name=name, setting=setting: float_run(name, setting, arguments.out))
        for scheme in arguments.scheme or SCHEMES:
            for method, factor in planned(arguments):
                asked = (name, setting, scheme, method, factor, arguments)
                failed |= said(f"{name} {scheme} {method}", lambda asked=asked: exported_run(*asked))
    return failed


def said(what: str, run: Callable[[], None]) -> int:
    """Runs; 1 when it ended with an error, which is printed."""
    try:
        run()
    except AfqError as error:
        print(f"{what}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def planned(arguments: argparse.Namespace) -> list[tuple[str, float | None]]:
    """Method and, in the sweep, stability factor of every run of a scheme."""
    if arguments.sweep:
        return [("AffineQuant", factor) for factor in arguments.factor or SWEEP]
    return [(method, None) for method in arguments.method or METHODS]


def float_run(name: str, setting: Setting, out: Path) -> None:
    """The float model on the same tokens."""
    path = out / name / "float.json"
    if not path.exists():
        subject = open_subject(setting.model)
        windows = windows_for(subject, setting.eval, setting.window, setting.windows)
        stats = measure_one(subject.model, windows.ids_NT, silent)
        save(path, measured(stats, model=name, scheme="float", method="float"))


def exported_run(
    name: str, setting: Setting, scheme: str, method: str, factor: float | None, arguments: argparse.Namespace
) -> None:
    """Calibrates, exports and measures one recipe, unless it is done. Raises AfqError, also for figures of another."""
    recipe = METHODS[method]
    learning = (*LEARNED[method], *setting.learning) if method in LEARNED else ()
    changes = (*setting.samples, *learning, *arguments.set)
    folder = arguments.out / name / f"{scheme}+{recipe}"
    if factor is not None:
        folder = folder.with_name(f"{folder.name}+{factor:g}")
        changes = (*changes, f"learning.stability_factor={factor}")
    if arguments.seed:
        folder = folder.with_name(f"{folder.name}+seed{arguments.seed}")
    result = folder / "figures.json"
    if result.exists():
        found = msgspec.json.decode(result.read_bytes(), type=Row)
        if found.changes != changes:
            where, why = str(result), f"they were made with {' '.join(found.changes) or 'no change'}"
            raise InputError("figures of another recipe", where=where, why=why, do="take another --out")
        return
    started = time.monotonic()
    request = Request(
        target=TARGET,
        model=setting.model,
        recipe=f"{scheme}+{recipe}",
        changes=changes,
        calib=setting.calib,
        eval=setting.eval,
        out=str(folder),
        window=setting.window,
        eval_windows=setting.windows,
        seed=arguments.seed,
        threads=1,
    )
    job = resolve(request)
    with pipeline.open_folder(job) as run:
        calibration = pipeline.run_calibrate(job, run, silent)
        bundle = pipeline.run_lower(job, run, pipeline.run_quantize(job, run, calibration, silent), silent)
        stats = measure_one(open_subject(str(bundle.folder)).model, job.evaluation.ids_NT, silent)
    row = measured(
        stats,
        model=name,
        scheme=scheme,
        method=method,
        stability_factor=factor,
        seed=arguments.seed,
        changes=changes,
        bytes=bundle.model.stat().st_size,
        kernels=tuple(sorted({record.kernel for record in job.records.values()})),
        calibration=tuple(calibration.block(index).history for index in range(calibration.layers)),
        seconds=time.monotonic() - started,
    )
    save(result, row)
    print(f"{name} {scheme} {method} {row.perplexity.value:.3f} in {row.seconds:.0f} s", file=sys.stderr, flush=True)


def measured(stats: TokenStats, **facts: Any) -> Row:
    """A row of what was seen on the evaluation windows."""
    return Row(perplexity=stats.perplexity, window_nll=tuple(stats.nll.mean(1).tolist()), **facts)


def save(path: Path, row: Row) -> None:
    """Writes a row, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, msgspec.json.format(msgspec.json.encode(row), indent=1).decode() + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder, in which every run has one of its own")
    parser.add_argument("--model", action="append", required=True, choices=settings(""), help="may be repeated")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="may be repeated (default: all)")
    parser.add_argument("--method", action="append", choices=METHODS, help="may be repeated (default: all)")
    parser.add_argument("--smollm2", default="", help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--sweep", action="store_true", help="AffineQuant at every stability factor instead of methods")
    parser.add_argument("--factor", type=float, action="append", help="a stability factor of the sweep (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the windows while learning")
    parser.add_argument("--set", action="append", default=[], help="change of a recipe field, for all runs")
    arguments = parser.parse_args()
    if "SmolLM2-135M" in arguments.model and not arguments.smollm2:
        parser.error("--model SmolLM2-135M needs --smollm2 FILE.gguf")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
