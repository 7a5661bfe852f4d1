"""What a program file is, told from the file: its delegate, the file beside it, or one line that it is none of ours."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from afq_export.commands import describe
from afq_export.errors import InputError, MissingToolError
from afq_export.lower.executorch import readback
from afq_export.lower.executorch.readback import Delegate, Outline


@pytest.mark.parametrize(
    ("delegates", "calls", "backend"),
    [
        (("XnnpackBackend",), {}, "xnnpack"),
        (("VulkanBackend", "VulkanBackend"), {"aten::embedding.out": 1}, "vulkan"),
        (("CoreMLBackend",), {}, "coreml"),
        (("EthosUBackend",), {}, "ethos-u"),
        ((), {"cortex_m::quantized_conv2d.out": 3}, "cortex-m"),
        ((), {"aten::mm.out": 3}, "xnnpack"),
        (("QnnBackend",), {}, None),
        (("XnnpackBackend", "VulkanBackend"), {}, None),
    ],
)
def test_a_program_says_what_runs_it(
    delegates: tuple[str, ...], calls: dict[str, int], backend: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    outline = Outline(tuple(Delegate(name, b"") for name in delegates), len(delegates), calls, {}, ())
    monkeypatch.setattr(readback, "read_outline", lambda data: outline)
    path = tmp_path / "any.pte"
    path.write_bytes(b"")
    if backend:
        assert describe.maker(path) == backend
        return
    with pytest.raises(InputError, match=f"its delegates are of {', '.join(sorted(delegates))}"):
        describe.maker(path)


def test_beside_a_qnn_program_lies_its_description(tmp_path: Path) -> None:
    assert describe.maker(tmp_path / "prefill.onnx") == "onnxruntime"
    (tmp_path / "model.json").write_text("{}")
    assert describe.maker(tmp_path / "prefill.onnx") == "qnn"
    assert describe.maker(tmp_path / "openvino_model.xml") == "openvino"


def test_what_reads_a_format_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the command that installs it, where a backend's own reader imports it."""

    def absent(path: Path) -> None:
        importlib.import_module("openvino.no_such_module")

    monkeypatch.setattr("afq_export.backends.openvino.describe", absent)
    with pytest.raises(MissingToolError, match=r"no Python module openvino; pip install \"afq-export\[openvino\]\""):
        describe.program(tmp_path / "openvino_model.xml")
