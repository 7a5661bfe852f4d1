"""lm-eval's part: tasks made of local documents, asked of a model, and scored. Imports lm-eval and datasets."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from afq_export.errors import InputError
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.progress import Progress
from afq_export.runtime.library import quiet
from afq_export.spec.zeroshot import Score
from afq_export.zeroshot.sources import TaskSet

SEED = 1234
"""What lm-eval's command line gives its samplers."""
BATCH = 8
"""Sequences that the float model takes at a time; lm-eval pads the shorter ones on the right, behind what counts."""
PART = 32
"""Requests between two reports of progress."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """One model's scores in one task by metric, and a 1 or a 0 for every document."""

    scores: dict[str, Score]
    hits: dict[str, str]


class LocalTask(ConfigurableTask):
    """lm-eval's task, without the bar that it shows on standard error while it makes its requests."""

    def build_all_requests(self, **asked: Any) -> None:
        """As lm-eval does it."""
        with contextlib.redirect_stderr(io.StringIO()):
            super().build_all_requests(**asked)


def local_task(given: TaskSet) -> LocalTask:
    """lm-eval's task of a set's documents, without examples in the prompt."""
    blank = "continuation" in given.documents[0]
    config = {
        "task": given.name,
        "custom_dataset": lambda **ignored: {"test": Dataset.from_list(list(given.documents))},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "gold" if blank else "text",
        "doc_to_choice": "choices",
        "doc_to_target": "continuation" if blank else "gold",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in given.source.metrics],
        "num_fewshot": 0,
        "metadata": {"version": given.source.version},
    }
    task = LocalTask(config=config)
    task.set_fewshot_seed(SEED)
    return task


def ask(lm: Any, sets: Sequence[TaskSet], progress: Progress, label: str) -> dict[str, Answers]:
    """The answers of a model of lm-eval to every task, by name."""
    lm.loglikelihood = _in_parts(lm.loglikelihood, progress, label)
    try:
        found = evaluate(lm, {"tasks": {given.name: local_task(given) for given in sets}, "groups": {}})
    finally:
        del lm.loglikelihood
    return {given.name: _answers(given, found) for given in sets}


def float_model(model: FloatCheckpoint) -> Any:
    """lm-eval's Hugging Face model of a float model, in float32 on the CPU. Raises InputError without its files."""
    if model.files is None:
        raise InputError("the float model has no files for Hugging Face", where=model.name)
    with quiet():
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=str(model.files),
            gguf_file=model.gguf.name if model.gguf else None,
            device="cpu",
            dtype="float32",
            batch_size=BATCH,
        )


def tokens(lm: Any, given: TaskSet) -> str:
    """sha256 of the token ids of every request of a task. Raises InputError when one is longer than the context."""
    task = local_task(given)
    task.build_all_requests(rank=0, world_size=1)
    digest = hashlib.sha256()
    for request in task.instances:
        ids = lm.tok_encode("".join(request.args))
        if len(ids) - 1 > lm.max_length:
            raise InputError(
                "a document does not fit the context", where=f"{given.data.path}:{given.data.lines[request.doc_id]}",
                why=f"{len(ids) - 1} tokens, {lm.max_length} fit", do="lower with a larger context, or take a --limit",
            )  # fmt: skip
        digest.update(np.array([len(ids), *ids], "<i8").tobytes())
    return digest.hexdigest()


def _in_parts(asked: Callable[..., list], progress: Progress, label: str) -> Callable[[list], list]:
    """`asked` for a few requests at a time, silently: lm-eval's bars know nothing of ours."""

    def answered(requests: list) -> list:
        answers: list = []
        for start in range(0, len(requests), PART):
            progress(label, start, len(requests))
            answers += asked(requests[start : start + PART], disable_tqdm=True)
        progress(label, len(requests), len(requests))
        return answers

    return answered


def _answers(given: TaskSet, found: Any) -> Answers:
    scores, hits = {}, {}
    samples = sorted(found["samples"][given.name], key=lambda sample: sample["doc_id"])
    for metric in given.source.metrics:
        figures = found["results"][given.name]
        error = figures[f"{metric}_stderr,none"]
        # lm-eval has no error for a single document.
        scores[metric] = Score(float(figures[f"{metric},none"]), float(error) if len(samples) > 1 else 0.0)
        hits[metric] = "".join(str(int(sample[metric])) for sample in samples)
    return Answers(scores, hits)
