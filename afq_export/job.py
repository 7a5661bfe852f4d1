"""A request as typed, and the job it means: everything opened, checked and refused before any work."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import math
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from afq_export import __version__
from afq_export.backends import backend
from afq_export.calibrate.activations import Activations
from afq_export.calibrate.end_to_end import refuse_end_to_end
from afq_export.calibrate.shards import Shards, open_shards
from afq_export.errors import InputError, MissingToolError
from afq_export.extras import install_line, packages
from afq_export.files import sha256_file
from afq_export.fold.forms import SiteChoice, choose_forms
from afq_export.fold.online import online_config, with_online
from afq_export.fold.rotation import Rotation, rotate
from afq_export.load.checkpoint import DecoderWeights, FloatCheckpoint
from afq_export.load.corpus import Corpus, Windows, cut_windows, read_corpus, read_text_corpus, refuse_overlap
from afq_export.load.model import open_model
from afq_export.load.tiny import tiny_copy
from afq_export.load.tokenizer import open_tokenizer, tokenizer_digest
from afq_export.machine import default_threads, processor
from afq_export.quantize.assign import assign
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.spec.catalog import load_corpus, load_recipe, load_target
from afq_export.spec.recipe import Recipe
from afq_export.spec.request import Request
from afq_export.spec.strict import flat
from afq_export.spec.target import TargetProfile

DEMO = "demo-llama"
DEMO_CALIBRATION, DEMO_EVALUATION = "demo-calibration", "demo-evaluation"
TINY_CHANGES = (
    "samples.windows=4",
    "samples.length=32",
    "learning.epochs=1",
    "learning.batch=2",
)
TINY_WINDOWS = 2
USUAL_LENGTH, TINY_LENGTH = 512, 64
"""Tokens of an evaluation window."""
VERSIONED = ("torch", "transformers", "tokenizers", "executorch", "onnx", "onnxruntime", "safetensors", "numpy", "gguf")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What there is before any text is evaluated. `defaults` names what was taken because nothing was said."""

    request: Request
    model: FloatCheckpoint
    tokenizer: Any
    recipe: Recipe
    target: TargetProfile
    records: Mapping[str, LinearRecord]
    choices: tuple[SiteChoice, ...]
    corpus: Corpus
    calibration: Windows
    tuning: Windows
    """What is learned from end to end, after the blocks."""
    threads: int
    device: str
    """What blocks are learned on, as torch calls it: `cpu` or `cuda`."""
    shards: Shards
    defaults: tuple[str, ...]
    missing: str
    """What lowering waits for; empty when it can run."""

    def source(self, learned: Rotation | None = None) -> DecoderWeights:
        """What is calibrated and folded: the model in the basis that the recipe asks for, `learned` if it is to be."""
        transforms = self.recipe.transforms
        return rotate(with_online(self.model, transforms), transforms.rotation, self.request.seed, learned)


@dataclasses.dataclass(frozen=True)
class Job(Prepared):
    """A request whose every part exists and fits."""

    evaluation: Windows
    out: Path

    @property
    def bundle(self) -> Path:
        """Where the bundle goes."""
        return self.out / "bundle"

    def fingerprint(self) -> dict[str, str]:
        """Everything that the artifact's bytes depend on, flat, so that a difference can be named."""
        facts = {"weights": self.model.digest, "seed": str(self.request.seed), "threads": str(self.threads)}
        facts |= {"shards": str(self.shards.count)} if self.shards.count > 1 else {}
        facts |= {"device": self.device} if self.device != "cpu" else {}
        facts |= flat("config", self.model.config.to_dict())
        facts |= {"tokenizer": self.calibration.tokenizer_digest, "side files": _side_files(self.model)}
        facts |= flat("recipe", msgspec.to_builtins(self.recipe))
        facts |= flat("target", msgspec.to_builtins(self.target))
        facts |= {f"version.{name}": number for name, number in versions(self.target.tools).items()}
        facts |= {"calibration tokens": _tokens_digest(self.calibration)}
        return facts | ({"end-to-end tokens": _tokens_digest(self.tuning)} if self.recipe.end_to_end.steps else {})


def resolve(request: Request, *, lowers: bool = True) -> Job:
    """Opens and checks everything that `request` names. Raises InputError or MissingToolError, before any work.

    Without `lowers`, a tool that only lowering and running need may be missing.
    """
    ready = prepare(request, lowers=lowers)
    model, recipe, target = ready.model, ready.recipe, ready.target
    evaluation = open_corpus(request.eval or DEMO_EVALUATION)
    refuse_overlap(ready.corpus, evaluation)
    limit = min(target.shapes.context, model.config.max_positions)
    window = window_length(request.window, limit, TINY_LENGTH if request.tiny else USUAL_LENGTH)
    count = {None: TINY_WINDOWS if request.tiny else 40, 0: None}.get(request.eval_windows, request.eval_windows)
    defaults = ready.defaults
    if request.eval is None:
        defaults += ("evaluation on the demo corpus",)
    if request.out is None:
        defaults += (f"run folder {_default_out(request, target, recipe)}",)
    return Job(
        **{**vars(ready), "defaults": defaults},
        evaluation=cut_windows(evaluation, ready.tokenizer, ready.calibration.tokenizer_digest, window, count),
        out=Path(request.out or _default_out(request, target, recipe)),
    )


def prepare(request: Request, *, lowers: bool = True) -> Prepared:
    """Opens and checks all that `request` names but what is evaluated and where results go, as `resolve` does."""
    target = load_target(request.target)
    changes = (TINY_CHANGES + request.changes) if request.tiny else request.changes
    recipe = load_recipe(request.recipe or target.default_recipe, changes)
    model, defaults = _model(request)
    records = assign(model.config, recipe, target)
    missing = missing_tool(target, records)
    if missing and lowers:
        raise missing
    choices = choose_forms(online_config(model.config, recipe.transforms), recipe.transforms)
    tokenizer = open_tokenizer(model)
    corpus = open_corpus(request.calib or DEMO_CALIBRATION)
    length = min(recipe.samples.length, model.config.max_positions)
    digest, count = tokenizer_digest(tokenizer), recipe.samples.windows
    calibration = cut_windows(corpus, tokenizer, digest, length, count)
    refuse_end_to_end(recipe, target)
    further = recipe.end_to_end.windows if recipe.end_to_end.steps else 0
    tuning = cut_windows(corpus, tokenizer, digest, length, further) if further else calibration
    shards = open_shards(request.shards)
    shards.refuse_unfit(recipe, len(calibration.ids_NT))
    if request.recipe is None:
        defaults += (f"recipe {recipe.name} (the target's default)",)
    if request.calib is None:
        defaults += ("calibration on the demo corpus",)
    return Prepared(
        request=request,
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        target=target,
        records=records,
        choices=choices,
        corpus=corpus,
        calibration=calibration,
        tuning=tuning,
        threads=request.threads or default_threads(),
        device=processor(request.device, shards.world),
        shards=shards,
        defaults=defaults,
        missing=str(missing or ""),
    )


def activations(job: Prepared) -> Activations:
    """What the calibration activations of this process take, and may."""
    windows, length = job.calibration.ids_NT.shape
    windows //= job.shards.world
    if job.recipe.end_to_end.steps:  # of these, half as many copies: the float path's alone
        windows = max(windows, math.ceil(len(job.tuning.ids_NT) / 2))
    return Activations.of(windows, length, job.model.config.hidden, job.request.activation_memory_mb)


def missing_tool(target: TargetProfile, records: Mapping[str, LinearRecord]) -> MissingToolError | None:
    """What lowering to the target waits for on this machine. Raises InputError for what does not fit the target: no
    tool helps with that."""
    found = []
    for check in (lambda: check_tools(target), lambda: backend(target.backend).refuse(target, records)):
        try:
            check()
        except MissingToolError as error:
            found.append(error)
    return found[0] if found else None


def open_corpus(name: str) -> Corpus:
    """The corpus called `name`: shipped, a corpus TOML, or a text file."""
    found = load_corpus(name)
    return read_text_corpus(found) if isinstance(found, Path) else read_corpus(*found)


def window_length(asked: int | None, limit: int, usual: int = USUAL_LENGTH) -> int:
    """Tokens of an evaluation window: `asked`, else `usual` or what fits. Raises InputError beyond 2 to `limit`."""
    if asked is None:
        return min(usual, limit)
    if not 2 <= asked <= limit:
        raise InputError("window does not fit", where=f"--window {asked}", why=f"2 to {limit} tokens fit here")
    return asked


def check_tools(target: TargetProfile) -> None:
    """Raises MissingToolError when a Python module that the target needs is not installed."""
    for tool in target.tools:
        if importlib.util.find_spec(tool) is None:
            raise MissingToolError(
                "a tool is missing", where=target.name, why=f"no Python module {tool}", do=install_line(tool)
            )


def versions(tools: Collection[str] = ()) -> dict[str, str]:
    """Versions of the packages that results depend on; `tools` are the modules that a target needs besides."""
    found = {"afq-export": __version__}
    for name in (*VERSIONED, *packages(tools)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _tokens_digest(windows: Windows) -> str:
    return hashlib.sha256(windows.ids_NT.numpy().tobytes()).hexdigest()


def _model(request: Request) -> tuple[FloatCheckpoint, tuple[str, ...]]:
    model = open_model(request.model or DEMO)
    defaults = () if request.model else (f"the embedded demo model {DEMO}",)
    return (tiny_copy(model, request.seed) if request.tiny else model), defaults


def _default_out(request: Request, target: TargetProfile, recipe: Recipe) -> str:
    """`afq-out/<model>-<target>-<recipe>` in the working folder, `--tiny` after the model for a tiny copy."""
    name = Path(request.model or DEMO).resolve().name.removesuffix(".gguf")
    return f"afq-out/{name}{'--tiny' if request.tiny else ''}-{target.name}-{recipe.name}"


def _side_files(model: FloatCheckpoint) -> str:
    """sha256 over the small files of the model's folder that ship with it: templates and configurations."""
    if model.files is None or model.gguf is not None:
        return ""
    paths = sorted(path for kind in ("*.json", "*.jinja") for path in model.files.glob(kind))
    lines = [f"{path.name} {sha256_file(path)}" for path in paths if ".safetensors." not in path.name]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
