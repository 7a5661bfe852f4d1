"""What a baseline remembers of a bundle: the options of its runtime, and the versions that decide its bits."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from afq_export.guard.facts import changed_settings, facts_of, same_arithmetic
from afq_export.lower.bundle import Bundle
from afq_export.runtime.openvino import RunOptions, write_options
from afq_export.spec.catalog import load_target
from afq_export.spec.report import Manifest
from afq_export.spec.strict import to_toml
from tests.guard.sample import facts


def measured(folder: Path, group: str):
    """Facts of an OpenVINO bundle whose activations are quantized in groups of `group`."""
    folder.mkdir()
    (folder / "target.toml").write_text(to_toml(load_target("intel-openvino")))
    write_options(folder / "openvino_properties.json", RunOptions({"DYNAMIC_QUANTIZATION_GROUP_SIZE": group}))
    (folder / "openvino_model.xml").write_text("<net/>")
    sample = facts()
    manifest = Manifest(
        files={"openvino_properties.json": "a", "openvino_model.xml": "b"}, model=sample.model, recipe="r",
        target="intel-openvino", runtime="openvino", backend="openvino", program="openvino_model.xml", versions={},
        seed=0, command=(),
    )  # fmt: skip
    return facts_of(Bundle(folder, manifest), sample.perplexity, sample.machine, None)


def test_properties_are_options_too(tmp_path: Path) -> None:
    before, now = measured(tmp_path / "a", "32"), measured(tmp_path / "b", "0")
    assert before.settings["device"] == "CPU"
    assert [(d.name, d.was, d.now) for d in changed_settings(before, now)] == [
        ("DYNAMIC_QUANTIZATION_GROUP_SIZE", "32", "0")
    ]


@pytest.mark.parametrize("package", ["openvino", "onnxruntime-qnn"])
def test_another_provider_may_give_other_bits(package: str) -> None:
    before = facts(versions={"onnxruntime": "1.31.1", package: "1.0"})
    now = msgspec.structs.replace(before, versions={"onnxruntime": "1.31.1", package: "1.1"})
    assert same_arithmetic(before, before) == ""
    assert same_arithmetic(before, now) == f"{package} 1.0 is 1.1"


def test_the_runtime_of_a_bundle_has_a_version(tmp_path: Path) -> None:
    assert "openvino" in measured(tmp_path / "a", "32").versions
