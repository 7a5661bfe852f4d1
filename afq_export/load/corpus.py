"""Corpora: text read as one string, tokenised once, cut into windows of equal length."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from afq_export.errors import InputError
from afq_export.files import sha256_file
from afq_export.spec.corpus import CorpusSpec

WHOLE_BYTES = 12 << 20
"""A text up to here is read whole (tokenising takes up to 200 bytes of memory for each of them)."""
PASSAGES, PASSAGE_BYTES = 64, 64 << 10
"""Of a longer text, these many evenly spaced passages of this length are the corpus: windows are sampled anyway."""

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
    text, part = _read_text(path)
    if spec.sha256 and sha256_file(path) != spec.sha256:
        raise InputError("corpus changed", where=str(path), why="its sha256 is not the one that the corpus file names")
    start, end = (_line_end(text, fraction) for fraction in spec.part)
    return _corpus(spec.name + part, text[start:end], str(path))


def read_text_corpus(path: Path) -> Corpus:
    """A plain text file as a corpus, named after the file; of a huge one, passages, which the name then says."""
    text, part = _read_text(path)
    return _corpus(path.name + part, text, str(path))


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


def _read_text(path: Path) -> tuple[str, str]:
    """A file's text, and what to add to its name: nothing, or which part of it this is."""
    try:
        with path.open("rb") as file:
            data = file.read(WHOLE_BYTES + 1)
            if len(data) <= WHOLE_BYTES:
                return _newlines(data.decode()), ""
            if not path.is_file():
                raise InputError(
                    "text too large", where=str(path), why="it is no file", do="save a part of it to a file"
                )
            size = path.stat().st_size
            found = "".join(_passage(file, index * size // PASSAGES) for index in range(PASSAGES))
        return _newlines(found), f" ({PASSAGES} passages of its {size >> 20} MiB)"
    except OSError as error:
        raise InputError("cannot read text", where=str(path), why=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), why=str(error)) from error


def _passage(file: BinaryIO, start: int) -> str:
    """Text of PASSAGE_BYTES at most from `start` on, whole lines where it has any, else whole characters."""
    file.seek(start)
    data = file.read(PASSAGE_BYTES)
    first, last = data.find(b"\n") + 1 if start else 0, data.rfind(b"\n") + 1
    if first < last:
        return data[first:last].decode()
    if start:
        data = data[:3].lstrip(bytes(range(0x80, 0xC0))) + data[3:]  # the rest of a character that began before
    return codecs.getincrementaldecoder("utf-8")().decode(data)


def _newlines(text: str) -> str:
    """Line ends as Python's text files read them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


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
