"""Data files of zero-shot tasks: JSON lines, and the HellaSwag text that llama.cpp reads.

What is read is checked record by record: an error names file and line.
"""

from __future__ import annotations

import bz2
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from afq_export.errors import InputError
from afq_export.spec.strict import Data

Text = Annotated[str, Meta(min_length=1)]
Choices = Annotated[tuple[Text, ...], Meta(min_length=2)]
HELLASWAG_LINES = 6
"""Lines of a record of the text form: context, number of the right ending, four endings."""


class Question(Data):
    """A text and its possible continuations, of which `gold` (from 0) is right."""

    query: Text
    choices: Choices
    gold: Annotated[int, Meta(ge=0)]


class Blank(Data):
    """A continuation and the texts that it may follow, of which `gold` (from 0) is right."""

    context_options: Choices
    continuation: Text
    gold: Annotated[int, Meta(ge=0)]


Record = Question | Blank
R = TypeVar("R", Question, Blank)


@dataclasses.dataclass(frozen=True)
class Records:
    """A file's records, with the line of each, and the sha256 of its bytes."""

    path: Path
    digest: str
    lines: tuple[int, ...]
    records: tuple[Record, ...]


def read_records(path: Path, kind: type[Record]) -> Records:
    """The records of `path`. Raises InputError when it cannot be read, is empty, or a record is malformed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("cannot read the data file", where=str(path), why=error.strerror or str(error)) from error
    text = path.name.endswith((".txt", ".txt.bz2"))
    found = list(_of_text(_unpacked(data, path), path) if text else _of_json(data, path, kind))
    if not found:
        raise InputError("no record in the data file", where=str(path))
    lines, records = zip(*found, strict=True)
    return Records(path, hashlib.sha256(data).hexdigest(), lines, records)


def _of_json(data: bytes, path: Path, kind: type[R]) -> Iterator[tuple[int, R]]:
    decoder = msgspec.json.Decoder(kind)
    for number, line in enumerate(data.rstrip().split(b"\n") if data.strip() else (), 1):
        try:
            record = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _malformed(path, number, str(error)) from error
        count = len(record.choices if isinstance(record, Question) else record.context_options)
        if record.gold >= count:
            raise _malformed(path, number, f"gold is {record.gold}, there are {count} choices")
        yield number, record


def _of_text(data: bytes, path: Path) -> Iterator[tuple[int, Question]]:
    try:
        lines = data.decode("utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError("the data file is no UTF-8 text", where=str(path), why=str(error)) from error
    for start in range(0, len(lines) if data else 0, HELLASWAG_LINES):
        context, gold, *endings = [*lines[start : start + HELLASWAG_LINES], *[""] * HELLASWAG_LINES][:HELLASWAG_LINES]
        if gold not in ("0", "1", "2", "3"):
            raise _malformed(path, start + 2, "the number of the right ending, 0 to 3, is missing")
        for offset, part in enumerate((context, gold, *endings)):
            if not part.strip():
                raise _malformed(path, start + offset + 1, "nothing stands where a text should")
        yield start + 1, Question(query=context, choices=tuple(endings), gold=int(gold))


def _unpacked(data: bytes, path: Path) -> bytes:
    if path.suffix != ".bz2":
        return data
    try:
        return bz2.decompress(data)
    except (OSError, ValueError) as error:
        raise InputError("not a bzip2 file", where=str(path), why=str(error)) from error


def _malformed(path: Path, line: int, why: str) -> InputError:
    return InputError("malformed record", where=f"{path}:{line}", why=why)
