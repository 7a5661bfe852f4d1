"""Data files: what is read, and that a malformed record is named by file and line."""

from __future__ import annotations

import bz2
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afq_export.errors import InputError
from afq_export.zeroshot.records import Blank, Question, read_records
from tests.zeroshot.sample import BLANKS, ENDINGS, QUESTIONS

GOOD = '{"query": "a", "choices": ["b", "c"], "gold": 1}'


def test_json_lines(folder: Path) -> None:
    found = read_records(folder / "piqa.jsonl", Question)
    assert found.records[0] == Question("Question: The cat sat on the\n", ("mat and slept.", "moon"), 0)
    assert found.lines == (1, 2, 3, 4) and len(found.records) == len(QUESTIONS["piqa"])
    assert found.digest == hashlib.sha256((folder / "piqa.jsonl").read_bytes()).hexdigest()


def test_blanks(folder: Path) -> None:
    assert read_records(folder / "winogrande.jsonl", Blank).records[1].gold == BLANKS[1]["gold"] == 1


@pytest.mark.parametrize("name", ["h.txt", "h.txt.bz2"])
def test_the_text_form(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bz2.compress(ENDINGS.encode()) if name.endswith("bz2") else ENDINGS.encode())
    found = read_records(tmp_path / name, Question)
    assert [r.gold for r in found.records] == [2, 0] and found.lines == (1, 7)
    assert found.records[1].choices[3] == "Sleep."


TEXT = st.text(min_size=1, max_size=8)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=2, max_size=4)), min_size=1, max_size=4))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, list[str]]]) -> None:
    """Also with line separators of Unicode, which are no ends of lines in JSON lines."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    rows = [{"query": query, "choices": choices, "gold": len(choices) - 1} for query, choices in records]
    for plain in (True, False):
        text = "\n".join(json.dumps(row, ensure_ascii=plain) for row in rows)
        path.write_bytes(text.encode())
        found = read_records(path, Question)
        assert [(r.query, list(r.choices), r.gold) for r in found.records] == [(q, c, len(c) - 1) for q, c in records]


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ('{"query": "a", "choices": ["b", "c"]', "truncated"),
        ("", "truncated"),
        ('{"query": "a", "choices": ["b", "c"]}', "`gold`"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2, there are 2"),
        ('{"query": "a", "choices": ["b", "c"], "gold": -1}', "$.gold"),
        ('{"query": "a", "choices": ["b", "c"], "gold": "1"}', "$.gold"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "$.choices"),
        ('{"query": "", "choices": ["b", "c"], "gold": 0}', "$.query"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0, "label": 1}', "label"),
        ('{"context_options": ["b", "c"], "continuation": "d", "gold": 0}', "context_options"),
    ],
)
def test_a_malformed_record_is_named_by_its_line(tmp_path: Path, second: str, why: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"{GOOD}\n{second}\n{GOOD}\n")
    with pytest.raises(InputError) as error:
        read_records(path, Question)
    assert f"{path}:2]" in str(error.value) and why in str(error.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [("C\n4\na\nb\nc\nd\n", 2), ("C\n0\na\nb\nc\n", 6), ("C\n0\na\n\nc\nd\n", 4), (ENDINGS + "\n" + ENDINGS, 14)],
)
def test_a_malformed_text_is_named_by_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "x.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=f"{path}:{line}]"):
        read_records(path, Question)


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", b""), ("a.jsonl", b"\n\n"), ("a.txt", b"")])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match="no record"):
        read_records(tmp_path / name, Question)


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    for name, data, what in (
        ("a.txt.bz2", b"no", "bzip2"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("b.jsonl", b'{"query": "\xff"}', "malformed"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=what):
            read_records(tmp_path / name, Question)
    with pytest.raises(InputError, match="cannot read"):
        read_records(tmp_path / "none.jsonl", Question)
