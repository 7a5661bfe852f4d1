"""Corpora: text read as one string, tokenised once, cut into windows of equal length."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from afq_export.errors import InputError
from afq_export.files import sha256_file
from afq_export.spec.corpus import CorpusSpec

MAX_TEXT_BYTES = 1 << 28
"""A corpus beyond 256 MiB is refused: windows are sampled from it, more text brings nothing."""

SHARED_LINES_LIMIT = 0.01
"""Share of the evaluation text's long lines that may also stand in the calibration text."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text and where it is from. `digest` is the sha256 of the text itself, so a renamed copy is the same corpus."""

    name: str
    text: str
    digest: str


@dataclasses.dataclass(frozen=True)
class Windows:
    """Token ids [N, T] and the protocol they were cut by: what makes two perplexities comparable.

    `total` is the number of windows the corpus has; the N taken are evenly spaced (index floor(i * total / N)).
    """

    ids_NT: Tensor
    corpus: str
    digest: str
    length: int
    total: int
    tokenizer_digest: str
    stride: int
    bos: bool = False


def read_corpus(spec: CorpusSpec, base: Path) -> Corpus:
    """The text of `spec`, whose file is relative to `base`. Raises InputError: missing, empty, not the pinned one."""
    path = base / spec.file
    text = _read_text(path)
    if spec.sha256 and sha256_file(path) != spec.sha256:
        raise InputError("corpus changed", where=str(path), why="its sha256 is not the one that the corpus file names")
    start, end = (_line_end(text, fraction) for fraction in spec.part)
    return _corpus(spec.name, text[start:end], str(path))


def read_text_corpus(path: Path) -> Corpus:
    """A plain text file as a corpus, named after the file."""
    return _corpus(path.name, _read_text(path), str(path))


def refuse_overlap(calibration: Corpus, evaluation: Corpus) -> None:
    """Raises InputError when the two share text: a perplexity on calibration text says nothing."""
    if calibration.digest == evaluation.digest:
        raise InputError(
            "calibration and evaluation are the same text",
            where=f"{calibration.name}, {evaluation.name}",
            do="name two different corpora, or two parts of one",
        )
    seen, asked = _long_lines(calibration.text), _long_lines(evaluation.text)
    shared = len(seen & asked)
    if asked and shared > SHARED_LINES_LIMIT * len(asked):
        raise InputError(
            "calibration and evaluation overlap",
            where=f"{calibration.name}, {evaluation.name}",
            why=f"{shared} of {len(asked)} long lines of the evaluation text are in the calibration text",
            do="name disjoint texts",
        )


def cut_windows(corpus: Corpus, tokenizer, tokenizer_digest: str, length: int, count: int | None) -> Windows:
    """`count` windows (None: all) of `length` tokens, no BOS, remainder dropped, evenly spaced over the corpus.

    Raises InputError when the corpus has not one whole window.
    """
    ids = tokenizer(corpus.text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    total = len(ids) // length
    if total == 0:
        raise InputError(
            "corpus too short",
            where=corpus.name,
            why=f"{len(ids)} tokens, one window takes {length}",
            do="give a longer text or a smaller window",
        )
    taken = total if count is None else min(count, total)
    windows = torch.tensor(ids[: total * length], dtype=torch.int64).view(total, length)
    chosen = windows[torch.arange(taken) * total // taken]
    return Windows(chosen, corpus.name, corpus.digest, length, total, tokenizer_digest, stride=length)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise InputError("text too large", where=str(path), why=f"more than {MAX_TEXT_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("cannot read text", where=str(path), why=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), why=str(error)) from error


def _corpus(name: str, text: str, where: str) -> Corpus:
    if not text.strip():
        raise InputError("empty text", where=where, do="give a text with at least one window of tokens")
    return Corpus(name, text, hashlib.sha256(text.encode()).hexdigest())


def _line_end(text: str, fraction: float) -> int:
    """The end of the line in which `fraction` of the text lies; 0 and len(text) stay."""
    if fraction <= 0:
        return 0
    end = text.find("\n", int(fraction * len(text)))
    return len(text) if fraction >= 1 or end < 0 else end + 1


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}
