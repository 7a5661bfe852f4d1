"""Our documents are asked and scored as lm-eval's own definitions ask and score the same documents of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager

from afq_export.errors import InputError
from afq_export.zeroshot.harness import local_task
from afq_export.zeroshot.sources import SOURCES, open_set
from tests.zeroshot.sample import HUB

FOLDERS = {"arc_easy": "arc", "arc_challenge": "arc", "copa": "super_glue/copa"}
"""Task -> its folder in lm-eval, where it is not its name."""


def theirs(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's own task of one document in the hub's form."""
    split = {split: datasets.Dataset.from_list([HUB[name]]) for split in ("train", "validation", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda **asked: datasets.DatasetDict(split))
    folder = Path(lm_eval.tasks.__file__).parent / FOLDERS.get(name, name)
    return TaskManager(include_defaults=False, include_path=str(folder)).load([name])["tasks"][name]


def asked(task: Any) -> list[tuple[str, str]]:
    """The first document's requests."""
    task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(1)
    task.build_all_requests(limit=1, rank=0, world_size=1)
    return [request.args for request in task.instances]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_document_is_asked_and_scored_as_by_lm_eval(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer can be the likeliest; lengths decide among equals."""
    ours, task = local_task(open_set(name, folder, 1)), theirs(name, monkeypatch)
    requests = asked(ours)
    assert requests == asked(task) and len(requests) >= 2
    for likeliest in range(len(requests)):
        answers = [(-1.0 - (index != likeliest), False) for index in range(len(requests))]
        scores = ours.process_results(ours.eval_docs[0], answers)
        assert scores == task.process_results(task.eval_docs[0], answers)
        assert set(scores) == set(SOURCES[name].metrics)
    assert ours.VERSION == task.VERSION
    assert ours.aggregation() == task.aggregation() and ours.higher_is_better() == task.higher_is_better()


def test_every_task_has_a_sample() -> None:
    assert set(HUB) == set(SOURCES)


def test_hellaswag_is_cleaned(folder: Path) -> None:
    first, second = open_set("hellaswag", folder, None).documents
    assert first["text"] == "Cooking: A man stands in a kitchen. The old man"
    assert first["choices"][1] == "sings loudly."
    assert second["text"] == "Home: How to wash a cup. Take water. It should be warm."
    assert second["choices"][2] == "Buy a new one Sell it."


def test_the_limit_takes_the_first(folder: Path) -> None:
    every, two = open_set("piqa", folder, None), open_set("piqa", folder, 2)
    assert two.documents == every.documents[:2] and len(every.documents) == 4
    assert two.data.records == every.data.records


def test_what_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such task \[boolq\]; take some of arc_easy, arc_challenge, piqa"):
        open_set("boolq", folder, None)
    with pytest.raises(InputError, match=r"piqa needs piqa\.jsonl"):
        open_set("piqa", tmp_path, None)
