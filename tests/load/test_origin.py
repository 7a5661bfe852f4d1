"""Licence and base model as a model states them; its licence texts are handed on."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from afq_export.errors import InputError
from afq_export.load.model import open_model
from afq_export.load.origin import MAX_BYTES, folder_origin, gguf_origin, licence_files
from afq_export.spec.report import Origin

CARDS = {
    "---\nlicense: mit\nbase_model: owner/name\n---\n# x": Origin("mit", "owner/name"),
    "---\nlicense: other\nlicense_name: llama3.2\nbase_model:\n- a/b\n- c/d\n---\n": Origin("llama3.2", "a/b"),
    "---\nlicense: [mit, gpl]\n---\n": Origin("mit"),
    "---\nlicense: {a: 1}\nbase_model: 3\n---\n": Origin(),
    "---\nlicense: 'two\n\n  lines'\n---\n": Origin("two lines"),
    "# no front matter": Origin(),
}


@pytest.mark.parametrize("card", CARDS)
def test_a_card_says_it(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert folder_origin(tmp_path) == CARDS[card]


@pytest.mark.parametrize("card", [b"---\nlicense: [mit\n---\n", b"---\n- a\n---\n", b"---\nlicense: \xff\n---\n"])
def test_a_broken_card_is_refused_when_the_model_is_opened(tmp_path: Path, card: bytes) -> None:
    (tmp_path / "README.md").write_bytes(card)
    with pytest.raises(InputError, match=r"cannot read the model card .*README\.md") as refused:
        folder_origin(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_gguf_file_says_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "hub/owner/name")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_origin(tmp_path / "m.gguf") == Origin("apache-2.0", "hub/owner/name")


def test_licence_texts(tmp_path: Path) -> None:
    for name in ("LICENSE", "LICENCE.txt", "NOTICE", "MY_LICENSE", "README.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "LICENSE-link").symlink_to("/etc/passwd")
    (tmp_path / "LICENSE-large").write_bytes(b"x" * (MAX_BYTES + 1))
    assert [path.name for path in licence_files(tmp_path)] == ["LICENCE.txt", "LICENSE", "NOTICE"]


def test_the_demo_models_have_one() -> None:
    assert open_model("demo-llama").origin.licence == open_model("demo-opt").origin.licence == "apache-2.0"
