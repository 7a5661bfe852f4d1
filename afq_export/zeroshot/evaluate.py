"""A bundle or a float model through zero-shot tasks, and two results against each other, document by document."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from afq_export.errors import InputError
from afq_export.files import sha256_file
from afq_export.job import versions
from afq_export.load.model import open_model
from afq_export.lower.bundle import MANIFEST, Bundle
from afq_export.paths import Kind, kind_of
from afq_export.progress import Progress
from afq_export.spec.zeroshot import Difference, Documents, Evaluated, TaskScores, ZeroShot
from afq_export.zeroshot.library import require_lm_eval, silence
from afq_export.zeroshot.sources import TaskSet

PARTS = {"digest": "the data file", "count": "the number of documents", "version": "the task's version",
         "tokens": "the tokens of the documents"}  # fmt: skip
"""What two results must have in common; tokens last, because they follow from the others."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model of lm-eval, ready to be asked `sets`, whose `documents` by task are known to fit."""

    lm: Any
    facts: Evaluated
    sets: tuple[TaskSet, ...]
    documents: Mapping[str, Documents]


def open_subject(name: str, sets: Sequence[TaskSet]) -> Subject:
    """A bundle (or the run folder around it) in its runtime, or a float model in lm-eval's own Hugging Face model.

    Raises InputError, also for a document beyond the context; MissingToolError without lm-eval or the runtime.
    """
    require_lm_eval()
    silence()
    from afq_export.guard.subject import open_subject as open_guarded
    from afq_export.zeroshot import harness
    from afq_export.zeroshot.model import SessionLM

    kind = kind_of(Path(name)) if Path(name).exists() else Kind.MODEL
    if kind is Kind.MODEL:
        model = open_model(name)
        lm: Any = harness.float_model(model)
        facts = Evaluated(name=model.name, kind="float", digest=model.digest, model_digest=model.digest)
    else:
        opened = open_guarded(name)
        lm, facts = SessionLM(opened.session, opened.tokenizer), _facts(name, opened.bundle)
    documents = {given.name: _documents(given, harness.tokens(lm, given)) for given in sets}
    return Subject(lm, facts, tuple(sets), documents)


def evaluate(subject: Subject, limit: int | None, threads: int, progress: Progress) -> ZeroShot:
    """Asks `subject` everything. `limit` and `threads` are recorded."""
    from afq_export.zeroshot import harness

    answers = harness.ask(subject.lm, subject.sets, progress, f"{subject.facts.kind}: {subject.facts.name}")
    return ZeroShot(
        subject=subject.facts,
        limit=limit,
        seed=harness.SEED,
        threads=threads,
        tasks=tuple(
            TaskScores(task=name, documents=documents, scores=answers[name].scores, hits=answers[name].hits)
            for name, documents in subject.documents.items()
        ),
        versions=versions() | {"lm-eval": version("lm_eval")},
    )


def against(result: ZeroShot, reference: ZeroShot) -> ZeroShot:
    """`result` with its differences from `reference`, which has the same documents (see `refuse_others`)."""
    theirs = {task.task: task for task in reference.tasks}
    tasks = tuple(
        msgspec.structs.replace(
            task,
            reference=theirs[task.task].scores,
            difference={metric: paired(hits, theirs[task.task].hits[metric]) for metric, hits in task.hits.items()},
        )
        for task in result.tasks
    )
    return msgspec.structs.replace(result, tasks=tasks, reference=reference.subject)


def paired(hits: str, reference: str) -> Difference:
    """The difference of two models' hits on the same documents."""
    steps = [int(ours) - int(theirs) for ours, theirs in zip(hits, reference, strict=True)]
    count, mean = len(steps), sum(steps) / len(steps)
    variance = sum((step - mean) ** 2 for step in steps) / (count - 1) if count > 1 else 0.0
    return Difference(value=mean, stderr=math.sqrt(variance / count), gained=steps.count(1), lost=steps.count(-1))


def read_result(path: Path) -> ZeroShot:
    """What `evaluate --json` printed. Raises InputError when it is not that."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ZeroShot)
    except OSError as error:
        raise InputError("cannot read the earlier result", where=str(path), why=error.strerror or "") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            "not a result of this program", where=str(path), why=str(error), do="give what `evaluate --json` printed"
        ) from error


def refuse_others(was: Mapping[str, Documents], now: Mapping[str, Documents]) -> None:
    """Raises InputError unless a reference `was` asked all documents that are asked `now`, in the same way."""
    for name, documents in now.items():
        if name not in was:
            raise InputError("the reference was not asked this", where=name, why=f"it has {', '.join(was)}")
        for part, title in PARTS.items():
            old, new = getattr(was[name], part), getattr(documents, part)
            if old != new:
                raise InputError(
                    "results of different documents cannot be compared", where=name,
                    why=f"{title}: {str(old)[:12]} there, {str(new)[:12]} here", do="evaluate both alike",
                )  # fmt: skip


def _documents(given: TaskSet, tokens: str) -> Documents:
    return Documents(
        version=given.source.version,
        file=given.data.path.name,
        digest=given.data.digest,
        count=len(given.documents),
        in_file=len(given.data.records),
        tokens=tokens,
    )


def _facts(name: str, bundle: Bundle) -> Evaluated:
    manifest = bundle.manifest
    return Evaluated(
        name=name,
        kind="bundle",
        digest=sha256_file(bundle.folder / MANIFEST),
        model_digest=manifest.model.digest,
        recipe=manifest.recipe,
        target=manifest.target,
        runtime=bundle.runtime,
    )
