"""Corpora: parts, windows, overlap, and texts that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from afq_export.errors import InputError
from afq_export.files import sha256_file
from afq_export.load.corpus import cut_windows, read_corpus, read_text_corpus, refuse_overlap
from afq_export.load.model import open_model
from afq_export.load.tokenizer import open_tokenizer
from afq_export.spec.corpus import CorpusSpec
from tests.models import write_model

LINES = [f"This is line number {i} of a text that is long enough to count.\n" for i in range(100)]


def test_parts_are_disjoint_and_cut_at_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES))
    first, second = (
        read_corpus(CorpusSpec(name="x", file="a.txt", part=part), tmp_path) for part in ((0.0, 0.5), (0.5, 1.0))
    )
    assert first.text + second.text == "".join(LINES)
    assert first.text.endswith("\n")
    refuse_overlap(first, second)


def test_a_pinned_corpus_must_be_the_pinned_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES))
    spec = CorpusSpec(name="x", file="a.txt", sha256=sha256_file(tmp_path / "a.txt"))
    read_corpus(spec, tmp_path)
    (tmp_path / "a.txt").write_text("".join(LINES[:-1]))
    with pytest.raises(InputError, match="corpus changed"):
        read_corpus(spec, tmp_path)


def test_overlapping_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES[:60]))
    (tmp_path / "b.txt").write_text("".join(LINES[50:]))
    a, b = read_text_corpus(tmp_path / "a.txt"), read_text_corpus(tmp_path / "b.txt")
    with pytest.raises(InputError, match="10 of 50 long lines"):
        refuse_overlap(a, b)
    with pytest.raises(InputError, match="same text"):
        refuse_overlap(a, a)


@pytest.mark.parametrize(("content", "message"), [(b"", "empty text"), (b" \n", "empty text"), (b"\xff\xfe", "UTF-8")])
def test_what_is_not_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text_corpus(tmp_path / "a.txt")


def test_windows_are_evenly_spaced_and_without_bos(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(open_model(str(write_model(tmp_path / "m"))))
    (tmp_path / "a.txt").write_text("abcdefgh" * 10 + "xyz")
    corpus = read_text_corpus(tmp_path / "a.txt")
    windows = cut_windows(corpus, tokenizer, "digest", 8, 4)
    assert windows.total == 10 and windows.ids_NT.shape == (4, 8)
    assert tokenizer.decode(windows.ids_NT[1]) == "abcdefgh"
    assert len(cut_windows(corpus, tokenizer, "digest", 8, None).ids_NT) == 10
    with pytest.raises(InputError, match="83 tokens, one window takes 84"):
        cut_windows(corpus, tokenizer, "digest", 84, None)
