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
        ("riscv:u74", "unknown kind of device [riscv:u74]; known: host, arm64:CPU, ssh:USER@HOST, adb:SERIAL"),
        ("cortex-a76", "not a device [cortex-a76]; known: host,"),
    ],
)
def test_a_device_that_is_not_known(refused: Refused, finished: Path, text: str, said: str) -> None:
    assert refused("validate", str(finished), "--device", text).startswith(said)
    assert refused("device", "check", str(finished), "--device", text).startswith(said)
    assert refused("device", "bench", str(finished), "--device", text).startswith(said)
    assert refused("check", str(finished), "--baseline", "none", "--device", text).startswith(said)


def test_doctor_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["doctor", "--json"]) in (0, 3)
    devices = {device["kind"]: device for device in json.loads(capsys.readouterr().out)["devices"]}
    assert list(devices) == ["host", "arm64", "ssh", "adb"]
    assert devices["arm64"] == {
        "kind": "arm64",
        "form": "arm64:CPU",
        "found": "-",
        "missing": ["the arm64 emulation is not installed"],
        "do": "afq-export doctor --install arm64",
    }
    assert call(["doctor"]) in (0, 3)
    assert "afq-export doctor --install arm64" in capsys.readouterr().out


def test_the_list_needs_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert call(["device", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = {kind["kind"]: kind for kind in found["kinds"]}
    assert kinds["ssh"]["missing"] == ["ssh"] and kinds["adb"]["do"] == "install the Debian package adb"
    assert [device["name"] for device in found["attached"]] == ["host"]
    assert call(["device", "list"]) == 0
    assert "ssh:USER@HOST" in capsys.readouterr().out


def test_install_without_package_sources(
    refused: Refused, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused("doctor", "--install", "riscv").startswith("nothing to install by that name [riscv]")
    assert "is not on this machine" in refused("doctor", "--install", "arm64", code=3)
    assert not empty_cache.exists() or list(empty_cache.iterdir()) == []
