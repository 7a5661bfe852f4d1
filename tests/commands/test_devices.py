"""Devices on the command line: refused early, reported by `doctor`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from afq_export.cli import call

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_device_that_is_not_set_up_stops_before_the_ladder(refused: Refused, finished: Path) -> None:
    before = (finished / "bundle" / "report.json").read_bytes()
    line = refused("validate", str(finished), "--on", "arm64:cortex-a76", code=3)
    assert line.startswith("the arm64 emulation is not installed [")
    assert line.endswith("run `afq-export doctor --install arm64`")
    assert (finished / "bundle" / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arm64:cortex-a77", "unknown processor [arm64:cortex-a77]; known: cortex-a35,"),
        ("arm64:max", "no processor to judge on [arm64:max]: it has SME"),
        ("adb:emulator", "unknown kind of device [adb:emulator]; known: arm64"),
        ("cortex-a76", "cannot read --on [cortex-a76]"),
    ],
)
def test_a_device_that_is_not_known(refused: Refused, finished: Path, text: str, said: str) -> None:
    assert refused("validate", str(finished), "--on", text).startswith(said)


def test_doctor_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["doctor", "--json"]) in (0, 3)
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device == {
        "kind": "arm64",
        "found": "the arm64 emulation is not installed",
        "install": "afq-export doctor --install arm64",
    }
    assert call(["doctor"]) in (0, 3)
    assert "afq-export doctor --install arm64" in capsys.readouterr().out


def test_install_without_package_sources(
    refused: Refused, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused("doctor", "--install", "riscv").startswith("nothing to install by that name [riscv]")
    assert "is not on this machine" in refused("doctor", "--install", "arm64", code=3)
    assert not empty_cache.exists() or list(empty_cache.iterdir()) == []
