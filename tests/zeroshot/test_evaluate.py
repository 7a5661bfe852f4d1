"""`evaluate` on exported bundles, held to accuracies computed here; comparisons; and everything that is refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afq_export.cli import call
from afq_export.guard.subject import open_subject
from afq_export.spec.zeroshot import ZeroShot
from afq_export.zeroshot.evaluate import paired
from tests.zeroshot.sample import BLANKS, QUESTIONS

ALL = "arc_easy,arc_challenge,piqa,hellaswag,winogrande,openbookqa,copa"


def evaluated(capfd: pytest.CaptureFixture[str], *arguments: object) -> ZeroShot:
    capfd.readouterr()
    assert call(["evaluate", *map(str, arguments), "--threads", "1", "--json"]) == 0
    return msgspec.json.decode(capfd.readouterr().out, type=ZeroShot)


def test_the_accuracies_of_a_bundle(bundle: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Arithmetic of our own, every sequence in one call, no harness."""
    found = evaluated(capfd, bundle, "--tasks", "arc_easy,winogrande", "--data", folder)
    subject = open_subject(str(bundle))

    def loss(context: str, continuation: str) -> float:
        ids = torch.tensor(subject.tokenizer(context + continuation)["input_ids"])
        first = len(subject.tokenizer(context)["input_ids"])
        logs = subject.session.logits(ids[:-1]).double().log_softmax(-1)
        return -sum(float(logs[at - 1, ids[at]]) for at in range(first, len(ids)))

    hits: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "blank": []}
    for record in QUESTIONS["arc_easy"]:
        losses = [loss(record["query"] + "\nAnswer:", " " + choice) for choice in record["choices"]]
        shares = [one / len(choice) for one, choice in zip(losses, record["choices"], strict=True)]
        hits["acc"].append(losses.index(min(losses)) == record["gold"])
        hits["acc_norm"].append(shares.index(min(shares)) == record["gold"])
    for record in BLANKS:
        losses = [loss(option, " " + record["continuation"]) for option in record["context_options"]]
        hits["blank"].append(losses.index(min(losses)) == record["gold"])
    bits = {name: "".join(str(int(hit)) for hit in row) for name, row in hits.items()}
    questions, blanks = found.tasks
    assert questions.hits == {"acc": bits["acc"], "acc_norm": bits["acc_norm"]} and blanks.hits == {
        "acc": bits["blank"]
    }
    share = sum(hits["acc"]) / 4
    assert questions.scores["acc"].value == share
    assert questions.scores["acc"].stderr == pytest.approx(math.sqrt(share * (1 - share) / 3))


def test_all_tasks_against_the_float_model(bundle: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And the same difference from a result of the float model alone."""
    asked = ["--tasks", ALL, "--data", folder]
    found = evaluated(capfd, bundle, *asked, "--float", "demo-llama")
    assert [task.task for task in found.tasks] == ALL.split(",")
    alone = evaluated(capfd, "demo-llama", *asked)
    assert alone.subject == found.reference and alone.reference is None and alone.subject.kind == "float"
    for task, theirs in zip(found.tasks, alone.tasks, strict=True):
        assert task.reference == theirs.scores and task.documents == theirs.documents
        for metric, difference in task.difference.items():
            assert difference.value == pytest.approx(task.scores[metric].value - theirs.scores[metric].value)
            assert difference == paired(task.hits[metric], theirs.hits[metric])
    (folder / "float.json").write_bytes(msgspec.json.encode(alone))
    assert evaluated(capfd, bundle, *asked, "--compare", folder / "float.json").tasks == found.tasks


def test_the_result_names_what_it_is_of(bundle: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capfd, bundle, "--tasks", "piqa", "--data", folder, "--limit", "3")
    documents = found.tasks[0].documents
    assert (documents.count, documents.in_file, found.limit, found.threads, found.seed) == (3, 4, 3, 1, 1234)
    assert documents.digest == hashlib.sha256((folder / "piqa.jsonl").read_bytes()).hexdigest()
    manifest = (bundle / "bundle" / "manifest.json").read_bytes()
    assert found.subject.digest == hashlib.sha256(manifest).hexdigest()
    assert found.subject.model_digest == json.loads(manifest)["model"]["digest"]
    assert {"lm-eval", "afq-export", "transformers"} <= set(found.versions)


def test_the_table(bundle: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["--tasks", "arc_easy,copa", "--data", str(folder), "--float", "demo-llama", "--threads", "1"]
    assert call(["evaluate", str(bundle), *asked]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "w8a8-dynamic+rtn" in lines[0] and "lm-eval 0.4.13" in lines[0]
    assert lines[2].split() == ["task", "metric", "documents", "bundle", "reference", "difference", "changed"]
    assert [line.split()[:2] for line in lines[3:6]] == [
        ["arc_easy", "accuracy"],
        ["arc_easy", "by"],
        ["copa", "accuracy"],
    ]
    assert "4 of 4" in lines[3] and lines[3].count("±") == 3


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_a_paired_difference(hits: list[tuple[bool, bool]]) -> None:
    found = paired(*("".join(str(int(hit)) for hit in column) for column in zip(*hits, strict=True)))
    steps = torch.tensor(hits).double().diff(dim=1)[:, 0].neg()
    assert found.value == pytest.approx(float(steps.mean()))
    assert found.stderr == pytest.approx(float(steps.std()) / math.sqrt(len(hits)))
    assert found.gained == sum(ours > theirs for ours, theirs in hits)
    assert found.lost == sum(ours < theirs for ours, theirs in hits)


def test_what_is_asked_wrongly_is_refused(
    bundle: Path, folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    here = ["--data", str(folder)]
    assert "no such task [mmlu]" in refused(str(bundle), "--tasks", "piqa,mmlu", *here)
    assert "named twice" in refused(str(bundle), "--tasks", "piqa,piqa", *here)
    assert "no data file" in refused(str(bundle), "--tasks", "piqa", "--data", str(tmp_path))
    assert "no such model" in refused(str(tmp_path / "none"), "--tasks", "piqa", *here)
    assert "one comparison" in refused(
        str(bundle), "--tasks", "piqa", *here, "--float", "demo-llama", "--compare", "x.json"
    )
    (tmp_path / "piqa.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 7}\n')
    assert "piqa.jsonl:1]: gold is 7" in refused(str(bundle), "--tasks", "piqa", "--data", str(tmp_path))


def test_a_document_beyond_the_context_is_named(bundle: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    records = [
        {"query": "a", "choices": ["b", "c"], "gold": 0},
        {"query": "x1" * 2100, "choices": ["b", "c"], "gold": 0},
    ]
    (tmp_path / "copa.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    line = refused(str(bundle), "--tasks", "copa", "--data", str(tmp_path))
    assert "does not fit the context" in line and "copa.jsonl:2]" in line


def test_results_of_other_documents_are_not_compared(
    bundle: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    """The text, its number, the tokens, and a task that was not asked."""
    result = evaluated(capfd, bundle, "--tasks", "piqa", "--data", folder)
    path = tmp_path / "earlier.json"
    documents = result.tasks[0].documents
    for changed, what in (
        ({"digest": "0" * 64}, "the data file"),
        ({"count": 3}, "the number of documents"),
        ({"version": 2.0}, "version"),
        ({"tokens": "0" * 64}, "the tokens"),
    ):
        task = msgspec.structs.replace(result.tasks[0], documents=msgspec.structs.replace(documents, **changed))
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(result, tasks=(task,))))
        assert what in refused(str(bundle), "--tasks", "piqa", "--data", str(folder), "--compare", str(path))
    assert "was not asked this [copa]" in refused(
        str(bundle), "--tasks", "copa", "--data", str(folder), "--compare", str(path)
    )
    path.write_text("{}")
    assert "not a result" in refused(str(bundle), "--tasks", "piqa", "--data", str(folder), "--compare", str(path))


@pytest.mark.slow
def test_lm_evals_own_command_line(bundle: Path, folder: Path, tmp_path: Path) -> None:
    """A task file that reads local data, asked of a bundle by name; the figure is that of `evaluate`."""
    import subprocess
    import sys

    task = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "copa.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    command = [sys.executable, "-m", "afq_export.zeroshot", "run", "--model", "afq", "--model_args", f"bundle={bundle}",
               "--tasks", "mine", "--include_path", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|mine |" in done.stdout and "acc" in done.stdout
    wrong = subprocess.run([*command[:7], "bundle=none", *command[8:]], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("error: ")
