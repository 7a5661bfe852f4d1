"""Corpora: parts, windows, overlap, and texts that are none."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from afq_export.errors import InputError
from afq_export.files import sha256_file
from afq_export.load.corpus import (
    PASSAGE_BYTES,
    PASSAGES,
    WHOLE_BYTES,
    cut_windows,
    read_corpus,
    read_text_corpus,
    refuse_overlap,
)
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


def test_of_a_huge_text_passages_are_read(tmp_path: Path) -> None:
    """A GiB with holes: the same lines from all over it, in order, in a moment; a hole's zeros are characters too."""
    path, size = tmp_path / "a.txt", 1 << 30
    with path.open("wb") as file:
        for index in range(PASSAGES):
            file.seek(index * size // PASSAGES)
            file.write(f"head of {index}\nline of {index}\r\nend of".encode())
        file.truncate(size)
    corpus = read_text_corpus(path)
    assert corpus.name == "a.txt (64 passages of its 1024 MiB)"
    assert len(corpus.text) <= PASSAGES * PASSAGE_BYTES
    assert [line for line in corpus.text.split("\n") if line.startswith("line")] == [f"line of {i}" for i in range(64)]
    assert corpus == read_text_corpus(path)


@pytest.mark.parametrize("before", ["", "x", "xx", "xxx"])
def test_passages_are_whole_characters_where_there_are_no_lines(tmp_path: Path, before: str) -> None:
    (tmp_path / "a.txt").write_text(before + "\U0001f600" * (WHOLE_BYTES // 4 + 1), encoding="utf-8")
    text = read_text_corpus(tmp_path / "a.txt").text
    assert set(text.removeprefix(before)) == {"\U0001f600"} and len(text) > PASSAGES * (PASSAGE_BYTES // 4 - 2)


def test_a_huge_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x80abc\xff\n" * (WHOLE_BYTES // 6 + 1))
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_text_corpus(tmp_path / "a.bin")


def test_a_stream_is_read_when_it_ends_soon(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("some text",))
    writer.start()
    assert read_text_corpus(pipe).text == "some text"
    writer.join()
    with pytest.raises(InputError, match="it is no file"):
        read_text_corpus(Path("/dev/zero"))
