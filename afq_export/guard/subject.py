"""A bundle opened for the guard, and measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from afq_export.backends import backend
from afq_export.errors import InputError
from afq_export.guard.facts import facts_of, this_machine
from afq_export.guard.record import record
from afq_export.guard.speed import measure_speed
from afq_export.guard.tokens import Tokens
from afq_export.job import DEMO_EVALUATION, open_corpus, window_length
from afq_export.load.corpus import Windows, cut_windows
from afq_export.load.tokenizer import load_folder_tokenizer, tokenizer_digest
from afq_export.lower.bundle import Bundle, open_bundle
from afq_export.paths import bundle_folder
from afq_export.perplexity import WINDOWS
from afq_export.progress import Progress
from afq_export.runtime.session import Session
from afq_export.spec.baseline import Facts
from afq_export.spec.catalog import CORPORA, entries
from afq_export.spec.report import Protocol
from afq_export.validate.ladder import protocol_of

LEAST_WINDOWS, LEAST_WINDOW = 2, 4
"""An error over windows needs two of them; a window of 4 tokens has 3 to predict."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A bundle whose hashes hold, in its runtime, with its tokenizer."""

    bundle: Bundle
    session: Session
    tokenizer: Any


@dataclasses.dataclass(frozen=True)
class Measured:
    """`there`: log-probabilities of the reference's choices (see `record`)."""

    facts: Facts
    tokens: Tokens
    there: np.ndarray | None


def open_subject(path: str) -> Subject:
    """The bundle at `path`, or that of a run folder. Raises InputError, MissingToolError without its runtime."""
    bundle = open_bundle(bundle_folder(Path(path)))
    return Subject(bundle, backend(bundle.backend).open_session(bundle), load_folder_tokenizer(bundle.folder))


def new_windows(subject: Subject, text: str | None, window: int | None, count: int | None) -> Windows:
    """Windows for a new baseline; `count` None: as `perplexity`, 0: all. Raises InputError when there are too few."""
    length = window_length(window, subject.session.context)
    if length < LEAST_WINDOW:
        raise InputError("window does not fit", where=f"--window {length}", why=f"{LEAST_WINDOW} tokens at least")
    taken = {None: WINDOWS, 0: None}.get(count, count)
    windows = _cut(subject, text or DEMO_EVALUATION, length, taken)
    if len(windows.ids_NT) < LEAST_WINDOWS:
        raise InputError(
            "too few windows",
            where=windows.corpus,
            why=f"{len(windows.ids_NT)}, and the error of a drift is taken over windows",
            do="give a longer text or a smaller --window",
        )
    return windows


def windows_of(subject: Subject, protocol: Protocol, text: str | None) -> Windows:
    """The windows of a baseline's protocol, from the text named `text`, or the shipped one of its name.

    Raises InputError when there is no such text. Whether it is the baseline's is for the protocols to tell.
    """
    if text is None and protocol.corpus not in [entry.name for entry in entries(CORPORA)]:
        raise InputError("which text?", where=protocol.corpus, why="it is not a shipped one", do="name it with --eval")
    length = window_length(protocol.window, subject.session.context)
    return _cut(subject, text or protocol.corpus, length, protocol.windows)


def measure(
    subject: Subject, windows: Windows, threads: int, progress: Progress, reference: Tokens | None, speed: bool
) -> Measured:
    """Every window through the runtime, and the speed when asked for. Refuses nothing."""
    refuse_other_shape(reference, windows)
    stats, tokens, there = record(subject.session, windows.ids_NT, progress, reference)
    measured = measure_speed(subject.session, windows.ids_NT[0]) if speed else None
    return Measured(facts_of(subject.bundle, stats.perplexity, this_machine(threads), measured), tokens, there)


def refuse_other_shape(reference: Tokens | None, windows: Windows) -> None:
    """Raises InputError when a baseline's tokens are not those of its windows."""
    if reference is not None and reference.nll.shape != (len(windows.ids_NT), windows.length - 1):
        raise InputError("the baseline is damaged", why="its tokens are not those of its protocol")


def protocol(windows: Windows) -> Protocol:
    """As reports have it."""
    return protocol_of(windows)


def _cut(subject: Subject, text: str, length: int, count: int | None) -> Windows:
    return cut_windows(open_corpus(text), subject.tokenizer, tokenizer_digest(subject.tokenizer), length, count)
