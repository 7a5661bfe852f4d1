"""TOML from strangers: bounded in time, memory and depth, refused in one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from afq_export.errors import InputError
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.strict import MAX_DOTS, MAX_TOML_BYTES, read_toml

FULL = MAX_TOML_BYTES // 2 - 8
BOMBS = {
    "one key of many parts": "a." * FULL + "a=1",
    "one header of many parts": "[" + "a." * FULL + "a]",
    "many keys of many parts": ("a." * (MAX_DOTS + 1) + "a=1\n") * 1000,
    "arrays in arrays": "a=" + "[" * FULL,
    "tables in tables": "a=" + "{a=" * (FULL // 2),
    "an integer of many digits": "a=" + "9" * FULL,
    "an integer of too many digits": "a=" + "9" * 5000,
    "a string without an end": 'a="' + "x" * FULL,
    "too large": "#" * (MAX_TOML_BYTES + 1),
    "no text": "\ud800",
}


READERS = ("any TOML", "target", "recipe")


@pytest.mark.parametrize("read", [read_toml, load_target, lambda path: load_recipe(str(path), ())], ids=READERS)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path: Path, name: str, read) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(BOMBS[name].encode(errors="surrogatepass"))
    start = time.process_time()
    with pytest.raises(InputError) as refused:
        read(path if read is read_toml else str(path))
    assert time.process_time() - start < 2
    assert str(path) in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("value", ["a." * 190 + "a=1", "a=" + "[" * 150 + "]" * 150, "k=1\n" + "[[a]]\n" * 50_000])
def test_what_is_valid_but_no_recipe(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(value)
    assert read_toml(path)
    with pytest.raises(InputError, match="does not fit"):
        load_recipe(str(path), ())


def test_what_never_ends_is_not_read() -> None:
    with pytest.raises(InputError, match="file too large"):
        read_toml(Path("/dev/zero"))
