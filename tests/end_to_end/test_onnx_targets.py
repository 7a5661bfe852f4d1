"""The demo models through ONNX Runtime: every target and scheme, planted faults, and what is refused early."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from afq_export.cli import call
from afq_export.errors import InputError, VerdictError
from afq_export.job import resolve
from afq_export.lower.bundle import open_bundle, seal
from afq_export.pipeline import Outcome
from afq_export.progress import silent
from afq_export.quantize.assign import session_options
from afq_export.quantize.checkpoint import open_checkpoint
from afq_export.revalidate import revalidate
from afq_export.runfolder import RunFolder
from afq_export.spec.catalog import SCHEMES, entries, load_target
from afq_export.spec.request import Request
from afq_export.validate import onnxruntime as checks
from tests.end_to_end.runs import Runs, copy_of

TARGETS = ("linux-x64-ort", "linux-arm64-ort", "android-ort")
MODELS = ("demo-llama", "demo-opt")
ALL_SCHEMES = [entry.name for entry in entries(SCHEMES)]
SCHEME_NAMES = [name for name in ALL_SCHEMES if "a16-static" not in name]
"""16-bit activations are for NPUs: ONNX Runtime's CPU kernels have 8 bits, and say so."""
FAST = {
    *(("linux-x64-ort", MODELS[number % 2], scheme) for number, scheme in enumerate(SCHEME_NAMES)),
    ("linux-arm64-ort", "demo-opt", "w4a8-g32"),
    ("android-ort", "demo-llama", "w4a8-g32-all4"),
}
"""One model a scheme on the first target, one scheme on each of the others; a tiny copy takes a second or two."""
CASES = [
    pytest.param(target, model, scheme, marks=() if (target, model, scheme) in FAST else pytest.mark.slow)
    for target in TARGETS
    for model in MODELS
    for scheme in SCHEME_NAMES
]
GROUPS, DYNAMIC, STATIC = ("demo-llama", "w4a8-g32"), ("demo-opt", "w8a8-dynamic"), ("demo-opt", "w8a8-static")


def tiny(runs: Runs, target: str, model: str, scheme: str, **changes: Any) -> Outcome:
    """The run of a two-block random copy, rounded to nearest."""
    return runs(model, f"{scheme}+rtn", **{"target": target, "tiny": True, "window": 64, "changes": ()} | changes)


@pytest.mark.parametrize(("target", "model", "scheme"), CASES)
def test_the_file_is_the_integer_reference(runs: Runs, target: str, model: str, scheme: str) -> None:
    """Logits to the last bit, whatever the kernels; and each is the one that the target promises."""
    report = tiny(runs, target, model, scheme).report
    assert report.verdict == "pass", [check for check in report.checks if check.status != "passed"]
    assert {check.status for check in report.checks} == {"passed"}
    assert "kernels" in {check.name for check in report.checks}
    assert report.agreement.bit_for_bit == report.agreement.top1 == 1
    assert not report.agreement.disagreements
    profile = load_target(target)
    assert all(layer.passed for layer in report.layers)
    assert all(layer.exact or profile.kernel(layer.kernel).max_relative_error for layer in report.layers)
    assert [line.kernel for line in report.coverage.lowered] == [layer.kernel for layer in report.layers]
    assert all(line.reason and line.count for line in report.coverage.refused)


@pytest.mark.parametrize(("target", "model", "scheme"), CASES)
def test_the_bundle_has_all_its_files(runs: Runs, target: str, model: str, scheme: str) -> None:
    outcome = tiny(runs, target, model, scheme)
    files = set(outcome.bundle.manifest.files)
    assert {"model.onnx", "session_options.json", "genai_config.json", "target.toml", "recipe.toml"} <= files
    assert {"test_data_set_0/input_0.pb", "test_data_set_0/output_0.pb", "tokenizer.json"} <= files
    assert ("model.ort" in files) == load_target(target).onnx.ort_format
    assert load_target(str(outcome.bundle.folder / "target.toml")) == load_target(target)
    records = open_checkpoint(outcome.folder.quantized).records
    options = json.loads((outcome.bundle.folder / "session_options.json").read_text(encoding="utf-8"))
    given = options["config"] | {"graph_optimization_level": options["graph_optimization_level"]}
    assert given == session_options(records, load_target(target))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_learned_method_on_static_ranges(runs: Runs, target: str, model: str) -> None:
    changes = ("samples.windows=4", "samples.length=64", "learning.epochs=1")
    report = runs(model, "w8a8-static+affinequant", target=target, changes=changes).report
    assert report.verdict == "pass" and report.agreement.bit_for_bit == 1


def test_a_learned_method_on_a_tiny_copy(runs: Runs) -> None:
    """Transforms, clipping and ranges, and the bits are still the reference's."""
    asked = dict(target="linux-x64-ort", tiny=True, window=64, changes=())
    report = runs("demo-llama", "w8a8-static+affinequant", **asked).report
    assert report.verdict == "pass" and report.agreement.bit_for_bit == 1
    assert report.calibration[0].epochs


def test_requantized_outputs(runs: Runs) -> None:
    """QLinearMatMul: integers in, integers out."""
    changes = ('activations.output="static"',)
    report = tiny(runs, "linux-x64-ort", "demo-llama", "w8a8-static", changes=changes).report
    assert report.verdict == "pass" and report.agreement.bit_for_bit == 1
    assert {layer.kernel for layer in report.layers} == {"QLinearMatMul", "MatMulInteger"}


def test_kernels_side_by_side(runs: Runs) -> None:
    """Overrides give one model four kinds of linear."""
    changes = (
        'override=[{pattern="blocks.0.q_proj", activations="static", bits=8, group=0},'
        '{pattern="blocks.*.down_proj", bits=8, group=0}, {pattern="blocks.1.o_proj", bits=6}]',
    )
    report = tiny(runs, "linux-x64-ort", "demo-llama", "w4a8-g32", changes=changes).report
    assert report.verdict == "pass" and report.agreement.bit_for_bit == 1
    kernels = {layer.name: layer.kernel for layer in report.layers}
    assert kernels["blocks.0.q_proj"] == "MatMulIntegerToFloat"
    assert kernels["blocks.0.down_proj"] == "MatMulInteger"
    assert kernels["blocks.1.o_proj"] == "MatMulNBits-8-int8"
    assert kernels["blocks.0.k_proj"] == "MatMulNBits-4-int8"


# Planted faults


Change = Callable[[onnx.ModelProto], None]


@pytest.fixture
def victim(runs: Runs, tmp_path: Path) -> Callable[[tuple[str, str]], RunFolder]:
    """A copy of a finished run that a test may change."""
    return lambda of: RunFolder(copy_of(tiny(runs, "linux-x64-ort", *of), tmp_path / "victim"))


def rewrite(folder: RunFolder, change: Change) -> None:
    """Changes model.onnx and gives every file, as it is then, its entry in the manifest."""
    path, manifest = folder.bundle / "model.onnx", open_bundle(folder.bundle).manifest
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    seal(folder.bundle, manifest)


def one_bit(name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        data = bytearray(tensor.raw_data)
        data[len(data) // 2 // 4 * 4] ^= 1
        tensor.raw_data = bytes(data)

    return change


@pytest.mark.parametrize(
    ("of", "tensor", "said"),
    [
        (GROUPS, "blocks.1.up_proj.codes", r"\[blocks\.1\.up_proj\]: codes differ"),
        (GROUPS, "lm_head.scales", r"\[lm_head\]: scales differ"),
        (DYNAMIC, "blocks.0.fc2.bias", r"\[blocks\.0\.fc2\]: bias differs"),
        (STATIC, "blocks.1.fc1.codes", r"\[blocks\.1\.fc1\]: codes differ"),
        (DYNAMIC, "embed_positions.weight", r"\[embed_positions\.weight\]: its numbers"),
        (GROUPS, "rope.sin", r"\[rope\.sin\]: its numbers"),
        (GROUPS, "head.final_norm.weight", r"\[head\.final_norm\.weight\]: its numbers"),
    ],
)
def test_one_bit_under_a_new_seal(victim, of: tuple[str, str], tensor: str, said: str) -> None:
    folder = victim(of)
    rewrite(folder, one_bit(tensor))
    with pytest.raises(VerdictError, match=f"the file is not the checkpoint {said}"):
        revalidate(folder, silent)


def test_the_command_line_says_it_in_one_line(victim, capfd: pytest.CaptureFixture[str]) -> None:
    folder = victim(GROUPS)
    rewrite(folder, one_bit("blocks.0.v_proj.codes"))
    capfd.readouterr()
    assert call(["validate", str(folder.path)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "error: the file is not the checkpoint [blocks.0.v_proj]: codes differ"


def test_another_float_graph_between_the_same_integers(victim) -> None:
    """No tensor of the checkpoint is wrong: the logits are, and the verdict with them."""

    def other_epsilon(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 1.0

    folder = victim(DYNAMIC)
    rewrite(folder, other_epsilon)
    report = revalidate(folder, silent)
    assert report.verdict == "fail"
    assert report.agreement.bit_for_bit < 1
    assert "agreement" in {check.name for check in report.checks if check.status == "failed"}


def test_a_layer_that_falls_to_a_float_kernel_fails(victim, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU or in a runtime that does not fuse it: the profile says what ran."""
    measured = checks.executed_kernels

    def fallen(*args: Any) -> dict[str, str]:
        return measured(*args) | {"blocks.1.o_proj": "MatMul"}

    monkeypatch.setattr(checks, "executed_kernels", fallen)
    report = revalidate(victim(GROUPS), silent)
    failed = [check for check in report.checks if check.status == "failed"]
    assert report.verdict == "fail" and [check.name for check in failed] == ["kernels"]
    assert "blocks.1.o_proj ran as MatMul instead of MatMulNBits" in failed[0].detail


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("session.qdq_matmulnbits_accuracy_level", "0", "'0' instead of '4'"),
        ("session.x64quantprecision", None, "None instead of '1'"),
        ("session.disable_quant_qdq", "1", "'1' instead of None"),
        ("graph_optimization_level", "basic", "'basic' instead of 'all'"),
        ("providers", ["AzureExecutionProvider"], "'AzureExecutionProvider'"),
        ("prefill_length", 3, "prefill is 3 instead of 512"),
        ("context_length", 30, "context is 30 instead of 512"),
    ],
)
def test_other_session_options_are_found(victim, key: str, value: object, said: str) -> None:
    """Also those that change no result on this CPU."""
    folder = victim(GROUPS)
    path, manifest = folder.bundle / "session_options.json", open_bundle(folder.bundle).manifest
    data = json.loads(path.read_text(encoding="utf-8"))
    where = data["config"] if key.startswith("session.") else data
    where[key] = value
    if value is None:
        del where[key]
    path.write_text(json.dumps(data), encoding="utf-8")
    seal(folder.bundle, manifest)
    with pytest.raises(VerdictError, match=rf"the session options are not the target's .*{said}"):
        revalidate(folder, silent)


def test_what_the_accuracy_level_does_is_found_by_the_layers(victim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the options not compared: at level 0 activations stay float, and every linear in blocks departs."""
    folder = victim(GROUPS)
    path, manifest = folder.bundle / "session_options.json", open_bundle(folder.bundle).manifest
    path.write_text(path.read_text().replace('accuracy_level": "4"', 'accuracy_level": "0"'))
    seal(folder.bundle, manifest)
    monkeypatch.setattr("afq_export.backends.onnxruntime.verify_options", lambda bundle, expected: None)
    report = revalidate(folder, silent)
    assert report.verdict == "fail" and report.first_departure == "blocks.0.q_proj"


@pytest.mark.parametrize(
    "name", ["model.onnx", "session_options.json", "genai_config.json", "test_data_set_0/input_0.pb"]
)
def test_a_changed_file_under_an_old_seal(victim, name: str) -> None:
    folder = victim(GROUPS)
    path = folder.bundle / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match=rf"a file of the bundle was changed \[.*{name}\]"):
        revalidate(folder, silent)


def test_a_tied_table_is_in_the_file_once(runs: Runs) -> None:
    """The demo Llama is tied: with one grid for rows and head the same integers serve both."""
    outcome = tiny(runs, "android-ort", "demo-llama", "w4a8-g32-all4")
    checkpoint = open_checkpoint(outcome.folder.quantized)
    assert checkpoint.config.tied
    model = onnx.load(outcome.bundle.model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert not [name for name in stored if name.startswith("embed_tokens.")]
    codes = numpy_helper.to_array(stored["lm_head.codes"]).astype(np.int8)
    assert np.array_equal(codes.T, checkpoint.embedding().codes.numpy())


# Refused before any work


def refused(tmp_path: Path, **asked: Any) -> str:
    """What `run` says; nothing was written."""
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        resolve(Request(out=str(out), **asked))
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("target", ["linux-x64-ort", "android-xnnpack"])
@pytest.mark.parametrize("scheme", sorted(set(ALL_SCHEMES) - set(SCHEME_NAMES)))
def test_schemes_for_npus_say_why(tmp_path: Path, target: str, scheme: str) -> None:
    said = refused(tmp_path, target=target, model="demo-llama", recipe=scheme)
    assert f"no kernel [{target}: blocks.0.q_proj" in said
    assert "takes 8-bit activations, not 16" in said


@pytest.mark.parametrize("scheme", [name for name in SCHEME_NAMES if "a16" in name])
def test_weight_only_recipes_on_xnnpack_say_why(tmp_path: Path, scheme: str) -> None:
    said = refused(tmp_path, target="android-xnnpack", model="demo-llama", recipe=scheme)
    assert "no kernel [android-xnnpack: blocks.0.q_proj" in said
    assert "takes dynamic activations, not none" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("weights.group=48",), "MatMulNBits-4 takes groups of 16/32/64/128/256, not 48"),
        (("weights.symmetric=false",), "symmetric weights only"),
        (("weights.bits=2", "weights.group=512"), "MatMulNBits-2 takes groups of 16/32/64/128/256, not 512"),
        (('activations.mode="dynamic"', "activations.bits=16"), "8-bit activations, not 16"),
        (("embedding.group=48",), "the hidden size 128 is not a multiple of it"),
        (('override=[{pattern="blocks.*.down_proj", activations="dynamic"}]',), "two kernels exclude each other"),
        (('override=[{pattern="blocks.*.gate", bits=8}]',), "an override matches no layer"),
    ],
)
def test_what_onnx_runtime_does_not_have_is_refused(tmp_path: Path, changes: tuple[str, ...], said: str) -> None:
    changes = (*changes, 'fallback="refuse"')
    asked = dict(target="linux-x64-ort", model="demo-llama", recipe="w4a16-g32", changes=changes)
    assert said in refused(tmp_path, **asked)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[onnx]\nopset = 22\n", "the opset does not fit [target mine: onnx.opset = 22]"),
        ("[onnx]\nopset = 28\n", "26 the last that ONNX Runtime takes"),
        ("[onnx]\nir_version = 14\n", "the IR version does not fit [target mine: onnx.ir_version = 14]"),
        ('[onnx.session]\ngraph_optimization_level = "most"\n', "no such optimisation level"),
    ],
)
def test_a_target_that_the_runtime_cannot_have_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "linux-x64-ort"\nname = "mine"\n{text}')
    assert said in refused(tmp_path, target=str(path), model="demo-llama", recipe="w8a8-dynamic+rtn")
    arguments = ["run", "--target", str(path), "--recipe", "w8a8-dynamic+rtn", "--out", str(tmp_path / "out")]
    assert call(arguments) == 2
    assert not (tmp_path / "out").exists()


def test_a_provider_that_is_missing_ends_with_its_own_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "android-ort"\nname = "mine"\n[onnx]\nproviders = ["NnapiExecutionProvider"]\n')
    assert call(["run", "--target", str(path), "--tiny", "--out", str(tmp_path / "out")]) == 3
    assert "an execution provider is missing [NnapiExecutionProvider]" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_target_without_onnx_options_is_refused(tmp_path: Path) -> None:
    """An `onnxruntime` target has an [onnx] table, and kernels of that runtime."""
    path, asked = tmp_path / "bare.toml", dict(model="demo-llama", recipe="w8a8-dynamic+rtn")
    text = 'base = "android-xnnpack"\nname = "bare"\nruntime = "onnxruntime"\nbackend = "onnxruntime"\n'
    path.write_text(text)
    assert "the target has no [onnx] table [bare]" in refused(tmp_path, target=str(path), **asked)
    path.write_text(text + "[onnx]\nopset = 23\n")
    said = "ONNX Runtime has no such kernel [bare: qd8-f32-qc8w]"
    assert said in refused(tmp_path, target=str(path), **asked)
