"""Exported ONNX files against the models a user gets elsewhere: perplexity, size and speed, in one run.

    python examples/benchmarks/onnx_runtime.py --genai genai-int4 --float genai-fp32 --naive naive \
        --ours runs/w4a8-g32/bundle --ours w8a8=runs/w8a8-static/bundle --eval wiki.test.raw --json figures.json

Every model is a folder with model.onnx, a tokenizer and genai_config.json, which says what the inputs are called, which
session options belong to the file and whether its cache is one growing buffer: that is how it is run here. A folder may
have a name in front, `NAME=FOLDER`.

Perplexity: the text tokenised once, no BOS, 40 evenly spaced windows of 512 tokens, each from an empty cache, in one
call. Speed: 128 tokens of that text at once, then 40 steps of one token, through OrtValues without copies. All models
are loaded; in every round each is measured once, one after the other, and figures are divided by those of --genai of
the same round. Medians over the rounds are quoted, for a busy machine slows all of them down alike. With one thread
seconds are those that the processor worked for it, with more they are the clock's.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afq_export.files import sha256_file
from afq_export.load.corpus import Windows, cut_windows, read_text_corpus
from afq_export.load.tokenizer import load_folder_tokenizer, tokenizer_digest
from afq_export.machine import cpu_flags, cpu_name
from afq_export.report.tables import Table
from afq_export.validate.evaluate import TokenStats, measure_one

WINDOW, WINDOWS = 512, 40
PREFILL, STEPS = 128, 40
HEADER = (
    "model",
    "perplexity",
    "over float",
    "against GenAI",
    "MB",
    "of GenAI",
    "prefill tok/s",
    "of GenAI",
    "decode tok/s",
    "of GenAI",
)
MISSING = "-"


class Decoder:
    """One model.onnx in ONNX Runtime's CPU provider, driven as its genai_config.json says."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name, self.folder = name, folder
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        decoder = config["model"]["decoder"]
        self.shared = config["search"]["past_present_share_buffer"]
        self.path = folder / decoder["filename"]
        self._session = ort.InferenceSession(
            str(self.path), session_options(decoder["session_options"], threads), providers=["CPUExecutionProvider"]
        )
        self._heads, self._width = decoder["num_key_value_heads"], decoder["head_size"]
        kinds = [
            (decoder["inputs"][f"past_{kind}_names"], decoder["outputs"][f"present_{kind}_names"])
            for kind in ("key", "value")
        ]
        layers = range(decoder["num_hidden_layers"])
        self._caches = {past % layer: present % layer for layer in layers for past, present in kinds}
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._past: dict[str, ort.OrtValue] = {}

    def files(self) -> list[Path]:
        """The model file and those that hold its weights."""
        graph = onnx.load_model(self.path, load_external_data=False).graph
        data = {
            entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
        }
        return [self.folder / name for name in sorted({self.path.name} | data)]

    def digest(self) -> str:
        """sha256 of all that decides its logits here."""
        parts = [sha256_file(path) for path in (*self.files(), self.folder / "genai_config.json")]
        return hashlib.sha256("".join([*parts, ort.__version__]).encode()).hexdigest()

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 [T, V] of a sequence from an empty cache (see `runtime.session.Session`)."""
        return torch.from_numpy(self.start(ids.numpy(), len(ids)))

    def start(self, ids: np.ndarray, room: int) -> np.ndarray:
        """Logits [T, V] of the first tokens; `room`: tokens that the sequence will have at most."""
        rows = room if self.shared else 0
        shape = (1, self._heads, rows, self._width)  # an OrtValue does not copy: each cache has an array of its own
        self._past = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name in self._caches}
        return self.extend(ids, 0)

    def extend(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Logits [T, V] of tokens after `position` others."""
        binding = self._session.io_binding()
        total = position + len(ids)
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, total), np.int64)}
        feeds["position_ids"] = np.arange(position, total)[None]
        for name in self._inputs & feeds.keys():
            binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name]))
        binding.bind_output("logits")
        for past, present in self._caches.items():
            binding.bind_ortvalue_input(past, self._past[past])
            if self.shared:
                binding.bind_ortvalue_output(present, self._past[past])
            else:
                binding.bind_output(present)
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if not self.shared:
            self._past = dict(zip(self._caches, outputs[1:], strict=True))
        return outputs[0].numpy()[0]


@dataclasses.dataclass
class Figures:
    """What is known of one model: perplexity with its standard error, bytes, and seconds by round."""

    perplexity: float
    stderr: float
    over_float: float | None
    against_genai: float | None
    against_genai_stderr: float | None
    bytes: int
    prefill_s: list[float]
    decode_s: list[float]


def main() -> int:
    """Prints the table, and writes all figures when asked to."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    given = [*arguments.float, *arguments.genai, *arguments.naive, *arguments.ours]
    models = [Decoder(*named(part), arguments.threads) for part in given]
    if len({model.name for model in models}) < len(models):
        raise SystemExit("two models have one name: give them others, NAME=FOLDER")
    reference = named(arguments.genai[0])[0] if arguments.genai else models[0].name
    plain = named(arguments.float[0])[0] if arguments.float else None
    windows = same_windows(models, arguments)
    print(f"{windows.corpus}, {len(windows.ids_NT)} of {windows.total} windows of {WINDOW}", file=sys.stderr)
    keep = Path(arguments.keep) if arguments.keep else None
    stats = {model.name: perplexity(model, windows, keep) for model in models}
    now = time.thread_time if arguments.threads == 1 else time.perf_counter
    rounds = speed(models, windows.ids_NT[0].numpy(), arguments.rounds, now)
    found = {model.name: figures(model, stats, rounds[model.name], reference, plain) for model in models}
    print(Table(HEADER, tuple(row(n, found, reference) for n in found), frozenset(range(1, len(HEADER)))).markdown())
    if arguments.json:
        record = facts(arguments, windows) | {"models": {n: dataclasses.asdict(f) for n, f in found.items()}}
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def session_options(given: dict, threads: int) -> ort.SessionOptions:
    """What onnxruntime-genai makes of `decoder.session_options`, and the number of threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    for key, value in given.items():
        if key == "graph_optimization_level":
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, value)
        elif "." in key:
            options.add_session_config_entry(key, value)
    return options


def same_windows(models: list[Decoder], arguments: argparse.Namespace) -> Windows:
    """The windows of the text. Ends the program when two models' tokenizers cut it differently."""
    corpus = read_text_corpus(Path(arguments.eval))
    cut = []
    for model in models:
        tokenizer = load_folder_tokenizer(model.folder)
        cut.append(cut_windows(corpus, tokenizer, tokenizer_digest(tokenizer), WINDOW, arguments.windows))
    for model, windows in zip(models, cut, strict=True):
        if not torch.equal(windows.ids_NT, cut[0].ids_NT):
            raise SystemExit(f"{model.name} has other token ids than {models[0].name}: their figures do not compare")
    return cut[0]


def perplexity(model: Decoder, windows: Windows, keep: Path | None) -> TokenStats:
    """Losses of all tokens, from `keep` where the same file has been measured on the same tokens."""
    tokens = hashlib.sha256(windows.ids_NT.numpy().tobytes()).hexdigest()
    kept = keep / f"{model.digest()[:16]}-{tokens[:16]}.safetensors" if keep else None
    if kept and kept.is_file():
        stats = TokenStats(**load_file(kept))
    else:
        stats = measure_one(model, windows.ids_NT)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file({"nll": stats.nll, "top1": stats.top1.contiguous()}, kept)
    print(f"{model.name}: perplexity {stats.perplexity.value:.3f}", file=sys.stderr, flush=True)
    return stats


def speed(
    models: list[Decoder], ids: np.ndarray, rounds: int, now: Callable[[], float]
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of prefill and of decoding, by model and round. The first round, which warms up, is not kept."""
    found: dict[str, list[tuple[float, float]]] = {model.name: [] for model in models}
    for number in range(rounds + 1):
        for model in models:
            start = now()
            model.start(ids[:PREFILL], PREFILL + STEPS)
            middle = now()
            for position in range(PREFILL, PREFILL + STEPS):
                model.extend(ids[position : position + 1], position)
            if number:
                found[model.name].append((middle - start, now() - middle))
    return found


def figures(
    model: Decoder,
    stats: dict[str, TokenStats],
    seconds: list[tuple[float, float]],
    reference: str,
    plain: str | None,
) -> Figures:
    """All of one model."""
    own = stats[model.name]
    means = (own.nll - stats[reference].nll).mean(dim=1)
    value = own.perplexity
    difference = math.exp(float(means.mean()))
    return Figures(
        perplexity=value.value,
        stderr=value.stderr,
        over_float=value.value / stats[plain].perplexity.value - 1 if plain else None,
        against_genai=difference - 1,
        against_genai_stderr=difference * float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else None,
        bytes=sum(path.stat().st_size for path in model.files()),
        prefill_s=[prefill for prefill, _ in seconds],
        decode_s=[decode for _, decode in seconds],
    )


def row(name: str, found: dict[str, Figures], reference: str) -> tuple[str, ...]:
    """The table's cells."""
    own, other = found[name], found[reference]
    itself = name == reference
    cells = [f"{own.perplexity:.3f}", MISSING if own.over_float is None else f"{own.over_float:+.1%}"]
    error = own.against_genai_stderr
    cells.append(MISSING if itself else f"{own.against_genai:+.1%}" + ("" if error is None else f" (±{error:.1%})"))
    cells += [f"{own.bytes / 1e6:.1f}", f"{own.bytes / other.bytes:.2f}"]
    for tokens, mine, theirs in ((PREFILL, own.prefill_s, other.prefill_s), (STEPS, own.decode_s, other.decode_s)):
        ratios = [their / my for my, their in zip(mine, theirs, strict=True)]
        spread = "" if itself else f" ({min(ratios):.2f} to {max(ratios):.2f})"
        cells += [f"{tokens / statistics.median(mine):.1f}", f"{statistics.median(ratios):.2f}{spread}"]
    return (name, *cells)


def facts(arguments: argparse.Namespace, windows: Windows) -> dict:
    """What the figures were measured with."""
    return {
        "corpus": windows.corpus,
        "sha256": windows.digest,
        "window": WINDOW,
        "windows": len(windows.ids_NT),
        "of": windows.total,
        "prefill": PREFILL,
        "steps": STEPS,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "onnxruntime": ort.__version__,
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "flags": cpu_flags(),
    }


def named(given: str) -> tuple[str, Path]:
    """`NAME=FOLDER` or a folder, named after itself or, for a bundle, after the run."""
    name, separator, folder = given.rpartition("=")
    path = Path(folder)
    return (name if separator else (path.parent if path.name == "bundle" else path).name), path


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, what in (
        ("--genai", "folder of GenAI's builder, int4: what all are divided by"),
        ("--float", "folder of GenAI's builder, fp32"),
        ("--naive", "folder that naive_w8a8.py made"),
        ("--ours", "bundle of an ONNX Runtime target"),
    ):
        parser.add_argument(option, action="append", default=[], help=f"{what}; may be repeated")
    parser.add_argument("--eval", required=True, help="text")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", help="folder for token losses: a file that was measured before is not measured again")
    parser.add_argument("--json", help="file for all figures")
    arguments = parser.parse_args()
    if not (arguments.genai or arguments.ours or arguments.naive or arguments.float):
        parser.error("give a model")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
