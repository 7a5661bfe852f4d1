"""The baseline file: the same bytes, the same content, and one line for everything that is not one."""

from __future__ import annotations

import lzma
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afq_export.errors import InputError
from afq_export.guard import file as files
from afq_export.guard.baseline import first_losses, stored_tokens
from afq_export.guard.file import MAGIC, SIZE, read_baseline, write_baseline
from afq_export.guard.tokens import to_columns
from afq_export.spec.baseline import Baseline, Drift, Update
from tests.guard.sample import baseline, facts, protocol, tokens


def written(path: Path, content: bytes, size: int | None = None) -> Path:
    """A file in the form of a baseline around `content`, which may be anything."""
    path.write_bytes(MAGIC + SIZE.pack(len(content) if size is None else size) + lzma.compress(content))
    return path


def encoded(made: Baseline, **changes: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.to_builtins(made, builtin_types=(bytes,)) | changes)


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    drift = Drift(0.01, 0.001, 0.008, 0.012, 6, 186)
    update = Update(
        who="a", what="b", why="c", date="d", before=facts(), drift=drift, cumulative=drift, top1=1.0, kl=0.0
    )
    made = baseline(first_nll=tokens(3).nll.tobytes(), updates=(update,))
    write_baseline(tmp_path / "one", made)
    write_baseline(tmp_path / "two", made)
    assert read_baseline(tmp_path / "one") == made
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    write_baseline(tmp_path / "three", read_baseline(tmp_path / "one"))
    assert (tmp_path / "three").read_bytes() == (tmp_path / "one").read_bytes()
    kept, first = stored_tokens(made, ""), first_losses(made, "")
    for name in ("nll", "top1", "digest", "ids", "logs"):
        assert (getattr(kept, name) == getattr(tokens(), name)).all()
    assert (first == tokens(3).nll).all()


def test_what_is_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the baseline .*No such file"):
        read_baseline(tmp_path / "none")
    for data in (b"", b"afq", b"{}", MAGIC[:-1], os.urandom(300)):
        (tmp_path / "other").write_bytes(data)
        with pytest.raises(InputError, match=r"not a baseline \[.*other\]; `afq-export baseline create` makes one"):
            read_baseline(tmp_path / "other")


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "base"
    write_baseline(path, baseline())
    data = path.read_bytes()
    for length in (len(MAGIC), len(MAGIC) + 3, len(MAGIC) + 8, len(data) // 2, len(data) - 13, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="the baseline is damaged"):
            read_baseline(path)
    path.write_bytes(data + b"\0\0\0\0")
    with pytest.raises(InputError, match=r"damaged.*something follows it"):
        read_baseline(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_seen(tmp_path: Path, place: float, bit: int) -> None:
    """xz checks its content; the rest is the name and the size. Only xz's padding may be anything: the content is."""
    path = tmp_path / "base"
    write_baseline(path, baseline())
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = read_baseline(path)
    except InputError:
        return
    assert found == baseline()


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that says what it is, nor one that lies."""
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 16)
    zeros = bytes(1 << 22)
    with pytest.raises(InputError, match=r"too large.*4194304 bytes, at most 65536"):
        read_baseline(written(tmp_path / "bomb", zeros))
    with pytest.raises(InputError, match=r"damaged.*more than the 100 bytes it states"):
        read_baseline(written(tmp_path / "bomb", zeros, size=100))
    with pytest.raises(InputError, match=r"damaged.*truncated"):
        read_baseline(written(tmp_path / "bomb", bytes(10), size=100))


def test_a_decoder_that_wants_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_MEMORY", 1 << 16)
    with pytest.raises(InputError, match=r"the baseline is damaged.*[Mm]emory"):
        read_baseline(written(tmp_path / "bomb", bytes(100)))


def test_content_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "base"
    with pytest.raises(InputError, match=r"another version of this program .*: format 2, not 1"):
        read_baseline(written(path, encoded(baseline(), schema_version=2)))
    with pytest.raises(InputError, match=r"does not fit .*unknown field `extra`"):
        read_baseline(written(path, encoded(baseline(), extra=1)))
    with pytest.raises(InputError, match=r"does not fit .*Expected `str`, got `int`.*created"):
        read_baseline(written(path, encoded(baseline(), created=1)))
    for junk in (b"", b"\xc1", b"\x91" * 100_000, msgspec.msgpack.encode([1]), msgspec.msgpack.encode({"a": 1})):
        with pytest.raises(InputError, match="does not fit"):
            read_baseline(written(path, junk))


@pytest.mark.parametrize("column", ["nll", "top1", "digest", "ids", "logs"])
def test_columns_of_another_length(column: str) -> None:
    short = msgspec.structs.replace(to_columns(tokens()), **{column: getattr(to_columns(tokens()), column)[:-4]})
    with pytest.raises(InputError, match="the baseline is damaged"):
        stored_tokens(baseline(tokens=short), "file")


def test_protocols_and_losses_that_cannot_be() -> None:
    for windows, window in ((1, 32), (-6, 32), (6, 1), (6, -31), (10**9, 10**9)):
        with pytest.raises(InputError, match="the baseline is damaged"):
            stored_tokens(baseline(protocol=protocol(windows, window)), "file")
    broken = tokens().nll.copy()
    broken[0, 0] = np.nan
    with pytest.raises(InputError, match="a loss is not finite"):
        first_losses(baseline(first_nll=broken.tobytes()), "file")


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_baseline(tmp_path / "file" / "base", baseline())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
