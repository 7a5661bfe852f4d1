"""Which tasks there are, the files that they are read from, and how a record becomes what lm-eval's task asks.

lm-eval's own definitions fetch their data from a hub; these take local files and ask the same: the same context and
continuation strings, the same metrics. Followed: lm-eval 0.4.13, version 1.0 of every task. tests/zeroshot holds each
to lm-eval's definition, given the same document in the hub's form.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afq_export.errors import InputError
from afq_export.zeroshot.records import Blank, Question, Record, Records, read_records

Document = dict[str, Any]
"""What lm-eval gets: `text`, `choices`, `gold`, and `continuation` where the choices stand before it."""
NEWLINE = "\n"
SECOND_HALF = re.compile(r"(?<=[.!?] )[a-z][^.!?]*$")
"""In HellaSwag: the begun sentence at the end of a context, which has a field of its own in the data set."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A task: names of its file (the first that is there is read), the form of its records, and its metrics."""

    files: tuple[str, ...]
    record: type[Record]
    document: Callable[[Any], Document]
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    version: float = 1.0


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """A task with its documents, as many as were asked for."""

    name: str
    source: Source
    data: Records
    documents: tuple[Document, ...]


def open_set(name: str, folder: Path, limit: int | None) -> TaskSet:
    """The task `name` with the first `limit` documents of its file in `folder`.

    Raises InputError when there is no such task or file, or the file does not fit.
    """
    source = SOURCES.get(name)
    if source is None:
        raise InputError("no such task", where=name, do=f"take some of {', '.join(SOURCES)}")
    found = [folder / file for file in source.files if (folder / file).is_file()]
    if not found:
        raise InputError("no data file", where=str(folder), why=f"{name} needs {' or '.join(source.files)}")
    data = read_records(found[0], source.record)
    return TaskSet(name, source, data, tuple(source.document(record) for record in data.records[:limit]))


def _asked(record: Question) -> Document:
    """ARC and PIQA: the question, then `Answer:` on a line of its own."""
    return _plain(record) | {"text": f"{record.query.removesuffix(NEWLINE)}\nAnswer:"}


def _plain(record: Question) -> Document:
    return {"text": record.query, "choices": list(record.choices), "gold": record.gold}


def _joined(record: Question) -> Document:
    """COPA: its choices begin with a space, and lm-eval puts one more before them."""
    return _plain(record) | {"choices": [f" {choice[0].lower()}{choice[1:]}" for choice in record.choices]}


def _cleaned(record: Question) -> Document:
    """HellaSwag: lm-eval's cleaning, and its capital letter where the second half of a context begins.

    The file has the halves joined; where the first ends without a full stop, or the second has one, that is not seen.
    """
    from lm_eval.tasks.hellaswag.utils import preprocess

    query = SECOND_HALF.sub(lambda half: half[0].capitalize(), record.query)
    return {"text": preprocess(query), "choices": [preprocess(c) for c in record.choices], "gold": record.gold}


def _filled(record: Blank) -> Document:
    """WinoGrande: the words that fill the blank stand before what is scored (partial scoring)."""
    return {"choices": list(record.context_options), "continuation": record.continuation, "gold": record.gold}


SOURCES = {
    "arc_easy": Source(("arc_easy.jsonl",), Question, _asked),
    "arc_challenge": Source(("arc_challenge.jsonl",), Question, _asked),
    "piqa": Source(("piqa.jsonl",), Question, _asked),
    "hellaswag": Source(
        ("hellaswag.jsonl", "hellaswag_val_full.txt", "hellaswag_val_full.txt.bz2"), Question, _cleaned
    ),
    "winogrande": Source(("winogrande.jsonl",), Blank, _filled, ("acc",)),
    "openbookqa": Source(("openbookqa.jsonl", "openbook_qa.jsonl"), Question, _plain),
    "copa": Source(("copa.jsonl",), Question, _joined, ("acc",)),
}
