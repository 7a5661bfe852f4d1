"""Runs exported .onnx programs through ONNX Runtime on this machine, with the options that they were lowered for."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from afq_export.errors import AfqError, InputError, MissingToolError
from afq_export.runtime.session import check_ids, greedy
from afq_export.spec.strict import Data

if TYPE_CHECKING:
    import onnxruntime

LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
"""`graph_optimization_level` in our files -> ONNX Runtime's name."""
FIRST_VERSION = (1, 30)
"""The first version whose kernels are those of validate/integer/onnxruntime.py."""
INSTALL = 'run `pip install "onnxruntime>=1.30,<1.32"`'
SILENT = 4
"""Log level at which only fatal errors are printed: what goes wrong is raised as well."""
LEVEL = "graph_optimization_level"
CPU = "CPUExecutionProvider"
PAST, PRESENT = "past_key_values.", "present."


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a file is run: options that may change the arithmetic, execution providers, and the longest sequence."""

    session: Mapping[str, str]
    providers: tuple[str, ...] = (CPU,)
    context: int = 2048
    prefill: int = 512


class OnnxSession:
    """`Session` of a model.onnx that `lower_onnx` made; the KV cache is held here, between calls.

    Raises MissingToolError without ONNX Runtime or with one that lacks an execution provider, InputError when the file
    is missing, broken, or another model.
    """

    def __init__(self, path: Path, options: RunOptions, *, profile: Path | None = None) -> None:
        """`profile`: where the runtime writes which kernels ran (see `end_profile`)."""
        self._path = path
        self._session = open_session(path, options, profile=profile)
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        if "logits" not in outputs or "input_ids" not in inputs:
            raise InputError("not a decoder of this package", where=str(path), why="no input_ids or no logits")
        self._positions = "position_ids" in inputs
        self._outputs = list(outputs)
        self._empty = {name: _empty(value) for name, value in inputs.items() if name.startswith(PAST)}
        self._cache = self._empty
        self.vocab, self.context = int(outputs["logits"].shape[-1]), options.context
        self.prefill = min(options.prefill, self.context)

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 [T, V] of a sequence from position 0 (see `Session`)."""
        return self.extend(ids, 0)

    def extend(self, ids: Tensor, position: int) -> Tensor:
        """Float32 [T, V] of tokens after `position` others (see `Session`)."""
        self._check(ids, position)
        self._cache = {name: array[:, :, :position] for name, array in self._cache.items()} if position else self._empty
        rows = [self._call(part) for part in ids.split(self.prefill)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def generate(self, ids: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
        """Greedy continuation (see `Session`)."""
        return greedy(self, ids, tokens, stop)

    def run_both(self, ids: Tensor) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Inputs and outputs, by name, of one call with the sequence `ids` int64 [T] from position 0."""
        self._check(ids, 0)
        self._cache = self._empty
        feed = self._feed(ids)
        return feed, dict(zip(self._outputs, self._run(feed), strict=True))

    def end_profile(self) -> Path:
        """Ends profiling and gives the file that says which kernels ran."""
        return Path(self._session.end_profiling())

    def _call(self, ids: Tensor) -> Tensor:
        results = dict(zip(self._outputs, self._run(self._feed(ids)), strict=True))
        self._cache = {name: results[PRESENT + name.removeprefix(PAST)] for name in self._empty}
        return torch.from_numpy(results["logits"][0])

    def _feed(self, ids: Tensor) -> dict[str, np.ndarray]:
        """All inputs by name for the next tokens."""
        past, tokens = self._length(), len(ids)
        feed: dict[str, np.ndarray] = {"input_ids": ids.to(torch.long).numpy()[None]}
        feed["attention_mask"] = np.ones((1, past + tokens), np.int64)
        if self._positions:
            feed["position_ids"] = np.arange(past, past + tokens)[None]
        return feed | self._cache

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return self._session.run(self._outputs, feed)
        except Exception as error:  # ONNX Runtime's own errors have no common base besides it
            raise InputError("the program does not run", where=str(self._path), why=first_line(error)) from error

    def _length(self) -> int:
        """Tokens in the cache."""
        return next(iter(self._cache.values())).shape[2]

    def _check(self, ids: Tensor, position: int) -> None:
        check_ids(self, self._path, ids, position)
        if position > self._length():
            raise InputError(
                "tokens after others that were not seen", why=f"position {position}, {self._length()} seen"
            )


def _empty(value: Any) -> np.ndarray:
    """A cache without tokens of the input `value` [B, K, tokens, width]: float32, or uint8 when it is quantized."""
    _, heads, _, width = value.shape
    return np.zeros((1, heads, 0, width), np.uint8 if value.type == "tensor(uint8)" else np.float32)


def open_session(
    model: Path | bytes, options: RunOptions, *, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """ONNX Runtime's session of a file or of a model's bytes. Raises as OnnxSession does."""
    runtime = require_onnxruntime()
    refuse_missing_providers(options.providers)
    where = str(model) if isinstance(model, Path) else "a model in memory"
    if isinstance(model, Path) and not model.is_file():
        raise InputError("no program", where=where)
    try:
        given = session_options(options.session, profile)
        source = str(model) if isinstance(model, Path) else model
        session = runtime.InferenceSession(source, given, providers=list(options.providers))
    except AfqError:
        raise
    except Exception as error:  # ONNX Runtime's own errors have no common base besides it
        raise InputError("cannot load the program", where=where, why=first_line(error)) from error
    if tuple(session.get_providers()[: len(options.providers)]) != options.providers:
        raise MissingToolError("ONNX Runtime fell back to other providers", why=", ".join(session.get_providers()))
    return session


def session_options(session: Mapping[str, str], profile: Path | None = None) -> onnxruntime.SessionOptions:
    """ONNX Runtime's SessionOptions for `OnnxOptions.session`, with as many threads as torch has.

    Raises InputError for an optimisation level that it does not have.
    """
    runtime = require_onnxruntime()
    made, level = runtime.SessionOptions(), session.get(LEVEL, "all")
    if level not in LEVELS:
        raise InputError("no such optimisation level", why=level, do=f"take one of {', '.join(LEVELS)}")
    made.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, LEVELS[level])
    made.intra_op_num_threads, made.log_severity_level = torch.get_num_threads(), SILENT
    for key, value in session.items():
        if key != LEVEL:
            made.add_session_config_entry(key, value)
    if profile is not None:
        made.enable_profiling, made.profile_file_prefix = True, str(profile)
    return made


def require_onnxruntime() -> Any:
    """The module. Raises MissingToolError when it is not installed, or older than what the integer models describe."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingToolError("ONNX Runtime is not installed", do=INSTALL)
    import onnxruntime

    if older(onnxruntime.__version__):
        first = ".".join(map(str, FIRST_VERSION))
        raise MissingToolError(
            "ONNX Runtime is too old", why=f"{onnxruntime.__version__}, kernels are known from {first} on", do=INSTALL
        )
    return onnxruntime


def older(version: str) -> bool:
    """Whether `version` is before FIRST_VERSION; `1.31.0rc1` is not."""
    numbers = (re.match(r"\d+", part) for part in version.split("."))
    return tuple(int(number[0]) for number in numbers if number)[:2] < FIRST_VERSION


def refuse_missing_providers(providers: tuple[str, ...]) -> None:
    """Raises MissingToolError when a provider is not in this build: ONNX Runtime would run on the CPU and only warn."""
    there = require_onnxruntime().get_available_providers()
    for provider in providers:
        if provider not in there:
            raise MissingToolError(
                "an execution provider is missing",
                where=provider,
                why=f"this ONNX Runtime has {', '.join(there)}",
                do="install the build that has it",
            )


class OptionsFile(Data):
    """What session_options.json holds."""

    graph_optimization_level: str
    config: dict[str, str]
    providers: Annotated[tuple[str, ...], Meta(min_length=1)]
    context_length: Annotated[int, Meta(ge=1)]
    prefill_length: Annotated[int, Meta(ge=1)]


def write_options(path: Path, options: RunOptions) -> None:
    """session_options.json of a bundle."""
    file = OptionsFile(
        graph_optimization_level=options.session.get(LEVEL, "all"),
        config={key: value for key, value in options.session.items() if key != LEVEL},
        providers=options.providers,
        context_length=options.context,
        prefill_length=options.prefill,
    )
    path.write_text(json.dumps(msgspec.to_builtins(file), indent=1) + "\n", encoding="utf-8")


def read_options_file(path: Path) -> OptionsFile:
    """What the file at `path` says. Raises InputError when it is missing or does not fit."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=OptionsFile)
    except OSError as error:
        raise InputError("no session options", where=str(path), why=error.strerror or str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError("the session options do not fit", where=str(path), why=str(error)) from error


def read_options(path: Path) -> RunOptions:
    """Inverse of `write_options`. Raises InputError as `read_options_file` does."""
    file = read_options_file(path)
    session = {LEVEL: file.graph_optimization_level} | file.config
    return RunOptions(session, file.providers, file.context_length, file.prefill_length)


def first_line(error: Exception) -> str:
    """What a runtime's error says, without its stack."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
