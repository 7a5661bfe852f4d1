"""What reaches the terminal: results on standard output, everything else on standard error, third parties silent."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from afq_export.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LINE_SECONDS = 5.0
"""Where no terminal is, a line of progress is written at most this often."""

_ENVIRONMENT = {
    # Waiting OpenMP threads spin by default; on a busy machine that made calibration 18 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_LOGGERS = ("torchao", "torch.utils._pytree", "root")
"""Loggers that report on their own packages' insides while they are imported."""


def quieten() -> None:
    """Silences what libraries say about themselves; what the user's environment sets stays. Call before they load.

    torchao logs that its CUDA libraries do not load, torch that torchao registers enums; transformers shows bars.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


def note(text: str) -> None:
    """A message for the reader: on standard error, so that standard output holds the result alone."""
    print(text, file=sys.stderr, flush=True)


def emit(text: str, data: Any, as_json: bool) -> None:
    """The result on standard output: `text` for a reader, or `data` (plain or a struct) as one JSON document."""
    print(json_text(data) if as_json else text, flush=True)


def json_text(data: Any) -> str:
    """Readable JSON, the same for the same data, no final newline."""
    return msgspec.json.format(msgspec.json.encode(data, order="deterministic"), indent=1).decode()


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A bar with the time left when standard error is a terminal, else a line every few seconds."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=3600) as bars:
        yield _Bars(bars)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class _Bars:
    """A bar per label; a label `a: b` stands under the bar of `a`, any other takes its place."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        for other in [name for name in self._tasks if name != label and not label.startswith(f"{name}:")]:
            self._bars.remove_task(self._tasks.pop(other))
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)


class _Lines:
    """Plain lines, for logs."""

    def __init__(self) -> None:
        self._shown = time.monotonic()
        self._starts: dict[str, tuple[float, int]] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        start, first = self._starts.setdefault(label, (now, done))
        if now - self._shown < LINE_SECONDS:
            return
        self._shown = now
        left = (now - start) / (done - first) * (total - done) if done > first else 0.0
        note(f"{label}: {done} of {total}" + (f", {duration(left)} left" if left else ""))
