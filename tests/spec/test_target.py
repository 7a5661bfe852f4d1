"""Targets: what a file may start from, what every limit of a kernel refuses, and what a session has room for."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from afq_export.backends import backend
from afq_export.errors import InputError
from afq_export.quantize.assign import assign, session_options
from afq_export.spec.catalog import TARGETS, data_root, entries, load_recipe, load_target
from afq_export.spec.quant import Granularity, LinearSpec, QuantSpec
from afq_export.spec.strict import convert, read_toml, to_toml
from afq_export.spec.target import Kernel, No, TargetProfile, Yes
from tests.models import llama_config

ONNX = ("linux-x64-ort", "linux-arm64-ort", "android-ort")
CONFIG = llama_config(hidden=128, heads=4, head_dim=32, intermediate=256)


# Files


@pytest.mark.parametrize("name", [entry.name for entry in entries(TARGETS)])
def test_a_shipped_target_reads_back_from_the_bundle(name: str, tmp_path: Path) -> None:
    """target.toml of a bundle has no base: everything is written out."""
    target, path = load_target(name), tmp_path / "target.toml"
    path.write_text(to_toml(target))
    assert "base" not in read_toml(path)
    assert load_target(str(path)) == target
    assert target.name == name == Path(name).name


def test_a_base_is_changed_key_by_key() -> None:
    x64, arm64, android = (load_target(name) for name in ONNX)
    options = msgspec.structs.replace(x64.onnx, explicit_zero_points=True)
    assert arm64.onnx == options
    assert arm64.kernels == x64.kernels == android.kernels
    assert arm64.traps != x64.traps, "a list is replaced, not merged"
    assert android.onnx.explicit_zero_points and android.onnx.ort_format and not arm64.onnx.ort_format
    assert android.onnx.session == x64.onnx.session | {"graph_optimization_level": "extended"}
    assert android.shapes == x64.shapes


def test_a_users_file_may_start_from_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text('base = "linux-arm64-ort"\nname = "board"\n[shapes]\ncontext = 512\n')
    arm64 = load_target("linux-arm64-ort")
    shapes = msgspec.structs.replace(arm64.shapes, context=512)
    assert load_target(str(path)) == msgspec.structs.replace(arm64, name="board", shapes=shapes)


def test_a_chain_of_bases_is_followed() -> None:
    """android-ort stands on linux-arm64-ort, which stands on linux-x64-ort."""
    own = read_toml(data_root() / TARGETS / "android-ort.toml")
    middle = read_toml(data_root() / TARGETS / "linux-arm64-ort.toml")
    assert (own["base"], middle["base"]) == ("linux-arm64-ort", "linux-x64-ort")
    assert "kernels" not in own | middle and load_target("android-ort").kernels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "linux-arm-ort"\n', r"no such target \[linux-arm-ort\].*did you mean linux-arm64-ort\?"),
        ('base = "nothing like it"\n', r"there are: android-ort, .*intel-openvino, .*linux-x64-ort"),
        ('base = "../targets/linux-x64-ort"\n', "no such target"),
        ('base = "linux-x64-ort"\ncolour = 1\n', "colour"),
        ('base = "linux-x64-ort"\n[onnx]\ncolour = 1\n', r"colour.*\$\.onnx"),
        ('base = "linux-x64-ort"\n[onnx]\nopset = "new"\n', r"\$\.onnx\.opset"),
        ('base = "linux-x64-ort"\n[onnx]\nproviders = []\n', r"\$\.onnx\.providers"),
        ('base = "linux-x64-ort"\n[onnx]\nexternal_data_mb = -1\n', r"\$\.onnx\.external_data_mb"),
        ('base = "linux-x64-ort"\n[onnx.session]\n"session.x" = 1\n', r"\$\.onnx\.session"),
        ('base = "linux-x64-ort"\nruntime = "tensorflow"\n', r"\$\.runtime"),
        ('base = "linux-x64-ort"\n[shapes]\ncontext = 1\n', r"\$\.shapes\.context"),
        ("base = 3\n", r"mine\.toml\]: base = 3 is not a name"),
        ('name = "bare"\n', "missing required field"),
    ],
)
def test_a_wrong_target_file_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_target(str(path))


def test_a_kernel_of_an_unknown_arithmetic_does_not_load(tmp_path: Path) -> None:
    data = msgspec.to_builtins(load_target("linux-x64-ort"))
    data["kernels"][0]["arithmetic"] = "onnxruntime.guess"
    with pytest.raises(InputError, match=r"does not fit \[here\]: .*\$\.kernels\[0\]\.arithmetic"):
        convert(data, TargetProfile, "here")


def test_every_kernel_with_a_tolerance_says_why() -> None:
    for name in ("android-xnnpack", *ONNX):
        for kernel in load_target(name).kernels:
            assert bool(kernel.max_relative_error) == bool(kernel.reason), kernel.name
            assert kernel.max_relative_error <= 1e-4


# Kernels


PLAIN = Kernel("plain", "onnxruntime.dynamic_per_token", (8,), 8, Granularity.PER_CHANNEL, "dynamic")
GROUPED = Kernel("grouped", "onnxruntime.weight_only", (4,), 4, Granularity.PER_GROUP, "none", groups=(32, 64))


def spec(**changes: object) -> LinearSpec:
    """A linear that PLAIN runs."""
    activation = QuantSpec(8, Granularity.PER_TOKEN, symmetric=False, dynamic=True)
    return LinearSpec("blocks.0.fc1", 24, 96, False, QuantSpec(8, Granularity.PER_CHANNEL), activation).__replace__(
        **changes
    )


def grouped(group: int, inputs: int = 96, **changes: object) -> LinearSpec:
    weight = QuantSpec(4, Granularity.PER_GROUP, group=group)
    return spec(weight=weight, activation=None, inputs=inputs, **changes)


STATIC_INPUT = QuantSpec(8, Granularity.PER_TENSOR, symmetric=False)
REFUSALS: list[tuple[Kernel, LinearSpec, str]] = [
    (PLAIN, spec(weight=QuantSpec(4, Granularity.PER_CHANNEL)), "plain takes 8-bit weights, not 4"),
    (PLAIN, spec(activation=None), "plain takes dynamic activations, not none"),
    (PLAIN, spec(activation=STATIC_INPUT), "plain takes dynamic activations, not static"),
    (
        PLAIN,
        spec(activation=QuantSpec(16, Granularity.PER_TOKEN, dynamic=True)),
        "plain takes 8-bit activations, not 16",
    ),
    (PLAIN, spec(output="static"), "plain leaves its output float, not static"),
    (
        PLAIN.__replace__(output="static"),
        spec(output="float"),
        "plain leaves its output static, not float",
    ),
    (
        PLAIN,
        spec(weight=QuantSpec(8, Granularity.PER_GROUP, group=32)),
        "plain takes per_channel weights, not per_group",
    ),
    (PLAIN, spec(weight=QuantSpec(8, Granularity.PER_CHANNEL, symmetric=False)), "plain takes symmetric weights only"),
    (PLAIN.__replace__(takes_bias=False), spec(bias=True), "plain takes no bias"),
    (PLAIN.__replace__(outputs_multiple_of=16), spec(), "plain takes a multiple of 16 outputs, not 24"),
    (PLAIN.__replace__(inputs_multiple_of=64), spec(), "plain takes a multiple of 64 inputs, not 96"),
    (GROUPED, grouped(16), "grouped takes groups of 32/64, not 16"),
    (GROUPED, grouped(64), "grouped takes whole groups only: 96 inputs are not a multiple of 64"),
    (GROUPED.__replace__(groups=(), group_multiple_of=32), grouped(48), "groups that are a multiple of 32, not 48"),
]


@pytest.mark.parametrize(("kernel", "asked", "said"), REFUSALS, ids=[said for *_, said in REFUSALS])
def test_every_limit_refuses_with_its_reason(kernel: Kernel, asked: LinearSpec, said: str) -> None:
    assert said in kernel.refusal(asked)


def test_what_is_within_the_limits_runs() -> None:
    assert PLAIN.refusal(spec()) == PLAIN.refusal(spec(output="float", bias=True)) == ""
    assert GROUPED.refusal(grouped(32)) == GROUPED.refusal(grouped(64, 128)) == ""
    assert GROUPED.__replace__(ragged_groups=True).refusal(grouped(64)) == ""
    assert PLAIN.__replace__(output="static").refusal(spec(output="any")) == ""
    assert PLAIN.__replace__(outputs_multiple_of=8, inputs_multiple_of=32).refusal(spec()) == ""


def test_a_target_takes_its_first_kernel_that_fits() -> None:
    target = load_target("linux-x64-ort")
    static = spec(activation=STATIC_INPUT)
    kernels = {output: target.supports(static.__replace__(output=output)) for output in ("any", "float", "static")}
    assert {output: answer.kernel.name for output, answer in kernels.items() if isinstance(answer, Yes)} == {
        "any": "MatMulIntegerToFloat",
        "float": "MatMulIntegerToFloat",
        "static": "QLinearMatMul",
    }
    biased = target.supports(static.__replace__(output="static", bias=True))
    assert isinstance(biased, No) and "QLinearMatMul takes no bias" in biased.reason


@pytest.mark.parametrize(
    ("weight", "activation", "kernel", "opset"),
    [
        (QuantSpec(2, Granularity.PER_GROUP, group=64), None, "MatMulNBits-2", 25),
        (QuantSpec(3, Granularity.PER_GROUP, group=128), None, "MatMulNBits-4", 0),
        (QuantSpec(6, Granularity.PER_GROUP, group=16), None, "MatMulNBits-8", 0),
        (QuantSpec(4, Granularity.PER_GROUP, group=32), "dynamic", "MatMulNBits-4-int8", 0),
        (QuantSpec(8, Granularity.PER_GROUP, group=256), "dynamic", "MatMulNBits-8-int8", 0),
        (QuantSpec(4, Granularity.PER_CHANNEL), "dynamic", "MatMulInteger", 0),
        (QuantSpec(4, Granularity.PER_CHANNEL), None, "MatMulNBits-4-row", 0),
        (QuantSpec(3, Granularity.PER_CHANNEL), None, "MatMulNBits-4-row", 0),
    ],
)
def test_the_kernels_of_onnx_runtime(weight: QuantSpec, activation: str | None, kernel: str, opset: int) -> None:
    asked = spec(weight=weight, **({} if activation else {"activation": None}))
    answer = load_target("linux-x64-ort").supports(asked)
    assert isinstance(answer, Yes)
    assert (answer.kernel.name, answer.kernel.opset) == (kernel, opset)


@pytest.mark.parametrize(
    ("weight", "activation", "said"),
    [
        (QuantSpec(8, Granularity.PER_CHANNEL), None, "takes per_group weights, not per_channel"),
        (QuantSpec(2, Granularity.PER_CHANNEL), None, "takes per_group weights, not per_channel"),
        (QuantSpec(4, Granularity.PER_GROUP, group=48), None, "takes groups of 16/32/64/128/256, not 48"),
        (QuantSpec(2, Granularity.PER_GROUP, group=16), "dynamic", "takes groups of 32/64/128, not 16"),
        (QuantSpec(4, Granularity.PER_GROUP, symmetric=False, group=32), None, "symmetric weights only"),
    ],
)
def test_what_onnx_runtime_has_no_integer_kernel_for(weight: QuantSpec, activation: str | None, said: str) -> None:
    answer = load_target("linux-x64-ort").supports(spec(weight=weight, **({} if activation else {"activation": None})))
    assert isinstance(answer, No) and said in answer.reason


def test_two_bits_need_outputs_in_fours() -> None:
    """The runtime gives wrong numbers otherwise."""
    for activation, kernel in ((None, "MatMulNBits-2"), (spec().activation, "MatMulNBits-2-int8")):
        asked = spec(weight=QuantSpec(2, Granularity.PER_GROUP, group=32), activation=activation, outputs=26)
        answer = load_target("linux-x64-ort").supports(asked)
        assert isinstance(answer, No) and f"{kernel} takes a multiple of 4 outputs, not 26" in answer.reason


# Sessions


def records(scheme: str, *changes: str, target: str = "linux-x64-ort"):
    profile = load_target(target)
    return assign(CONFIG, load_recipe(scheme, changes), profile), profile


def test_options_are_the_targets_and_its_kernels() -> None:
    base = dict(load_target("linux-x64-ort").onnx.session)
    level = "session.qdq_matmulnbits_accuracy_level"
    assert session_options(*records("w8a8-dynamic")) == base
    assert session_options(*records("w4a8-g32")) == base | {level: "4"}
    assert session_options(*records("w4a16-g32")) == base | {level: "0"}
    assert session_options(*records("w4a8-g32", target="android-xnnpack")) == {}


@pytest.mark.parametrize("mode", ["none", "dynamic"])
def test_levels_that_exclude_each_other_are_refused_before_any_work(mode: str, tmp_path: Path) -> None:
    """Some linears with float activations in blocks, some with int8 ones: a session has one accuracy level."""
    scheme = {"none": "w4a8-g32", "dynamic": "w4a16-g32"}[mode]
    path = tmp_path / "mixed.toml"
    path.write_text(f'scheme = "{scheme}"\n[[override]]\npattern = "blocks.*.down_proj"\nactivations = "{mode}"\n')
    said = r"two kernels exclude each other \[linux-x64-ort\]: session\.qdq_matmulnbits_accuracy_level: .*one value"
    with pytest.raises(InputError, match=said):
        assign(CONFIG, load_recipe(str(path)), load_target("linux-x64-ort"))


def test_an_override_of_activations_beside_the_level_is_taken(tmp_path: Path) -> None:
    """Static or dynamic int8 per row next to weight-only blocks: no option is asked for twice."""
    path = tmp_path / "mixed.toml"
    path.write_text(
        'scheme = "w4a16-g32"\n'
        '[[override]]\npattern = "blocks.*.down_proj"\nactivations = "dynamic"\nbits = 8\ngroup = 0\n'
        '[[override]]\npattern = "blocks.1.*_proj"\nactivations = "static"\nbits = 8\ngroup = 0\n'
    )
    found = assign(CONFIG, load_recipe(str(path)), load_target("linux-x64-ort"))
    assert found["blocks.0.q_proj"].kernel == "MatMulNBits-4"
    assert found["blocks.0.down_proj"].kernel == "MatMulInteger"
    assert found["blocks.0.down_proj"].spec.activation == QuantSpec(8, Granularity.PER_TOKEN, True, dynamic=True)
    assert found["blocks.1.down_proj"].kernel == "MatMulIntegerToFloat", "the last that matches"
    assert found["blocks.1.down_proj"].spec.output == "float"
    assert found["lm_head"].spec.activation is None


def test_an_override_may_leave_one_linear_float_activations() -> None:
    found, _ = records("w4a8-g32", 'override=[{pattern="blocks.0.q_proj", bits=8, group=0}]')
    assert found["blocks.0.q_proj"].kernel == "MatMulInteger"
    assert found["blocks.0.q_proj"].spec.activation.group == 0
    assert found["blocks.0.k_proj"].spec.activation == QuantSpec(8, Granularity.PER_GROUP, group=32, dynamic=True)


def test_an_unknown_mode_of_an_override_is_refused() -> None:
    with pytest.raises(InputError, match=r"\$\.override\[0\]\.activations"):
        records("w4a8-g32", 'override=[{pattern="blocks.0.q_proj", activations="sometimes"}]')


def test_a_static_output_is_asked_for_by_the_recipe() -> None:
    plain, _ = records("w8a8-static")
    kept, _ = records("w8a8-static", 'activations.output="static"')
    assert {record.kernel for name, record in plain.items() if name != "lm_head"} == {"MatMulIntegerToFloat"}
    assert {record.kernel for name, record in kept.items() if name != "lm_head"} == {"QLinearMatMul"}
    assert plain["lm_head"].kernel == kept["lm_head"].kernel == "MatMulInteger"
    xnnpack, _ = records("w8a8-static", target="android-xnnpack")
    assert {record.spec.output for name, record in xnnpack.items() if name != "lm_head"} == {"static"}
    with pytest.raises(InputError, match="qs8-qc8w leaves its output static, not float"):
        records("w8a8-static", 'activations.output="float"', target="android-xnnpack")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"opset": 40}, "the opset does not fit"),
        ({"stored_bits": 3}, "a kernel does not fit"),
        ({"runs_as": "MatMulFast"}, "a kernel does not fit"),
    ],
)
def test_a_kernel_that_cannot_be_written_is_refused_early(changes: dict[str, object], said: str) -> None:
    target = load_target("linux-x64-ort")
    kernels = tuple(msgspec.structs.replace(kernel, **changes) for kernel in target.kernels)
    changed = msgspec.structs.replace(target, kernels=kernels)
    with pytest.raises(InputError, match=said):
        backend("onnxruntime").refuse(changed, records("w4a8-g32+rtn")[0])


def test_an_option_that_genai_would_not_hand_on_is_refused_early() -> None:
    target = load_target("linux-x64-ort")
    onnx = msgspec.structs.replace(target.onnx, session={**target.onnx.session, "weird option": "1"})
    with pytest.raises(InputError, match="weird option"):
        backend("onnxruntime").refuse(msgspec.structs.replace(target, onnx=onnx), records("w4a8-g32+rtn")[0])
