"""The properties beside an OpenVINO program, and what is said when OpenVINO is missing: needs no OpenVINO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afq_export.errors import InputError, MissingToolError
from afq_export.runtime.openvino import RunOptions, read_options, require_openvino, write_options

OPTIONS = RunOptions({"INFERENCE_PRECISION_HINT": "f32"}, "CPU", 40, 8)


def test_options_read_back(tmp_path: Path) -> None:
    write_options(tmp_path / "p.json", OPTIONS)
    assert read_options(tmp_path / "p.json") == OPTIONS


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "no properties"), ("{", "do not fit"), ('{"device": "CPU"}', "do not fit"), ("\xff", "do not fit")],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "p.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=said):
        read_options(tmp_path / "p.json")


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    write_options(tmp_path / "p.json", OPTIONS)
    data = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    (tmp_path / "p.json").write_text(json.dumps(data | {"more": 1}), encoding="utf-8")
    with pytest.raises(InputError, match="more"):
        read_options(tmp_path / "p.json")


def test_without_openvino_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match=r"not installed.*pip install .afq-export\[openvino\]"):
        require_openvino()
