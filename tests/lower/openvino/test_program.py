"""Whole programs: equal to the integer reference to the last bit, read back to the last integer, faults found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")

from afq_export.arch import decoder  # noqa: E402
from afq_export.backends.openvino import refuse  # noqa: E402
from afq_export.errors import InputError, MissingToolError, VerdictError  # noqa: E402
from afq_export.lower.openvino.coverage import coverage_of  # noqa: E402
from afq_export.lower.openvino.float_parts import OpenvinoFloatParts  # noqa: E402
from afq_export.lower.openvino.program import verify  # noqa: E402
from afq_export.lower.openvino.readback import read_program  # noqa: E402
from afq_export.quantize.assign import assign, session_options  # noqa: E402
from afq_export.runtime.openvino import RunOptions, compiled, read_model  # noqa: E402
from afq_export.spec.catalog import load_recipe, load_target  # noqa: E402
from afq_export.validate.evaluate import hidden_states  # noqa: E402
from afq_export.validate.openvino import kernels_check  # noqa: E402
from afq_export.validate.rungs import ComparedParts, integer_rung  # noqa: E402
from tests.lower.onnx.decoders import PREFILL, PROVENANCE, decoder_config, random_ids  # noqa: E402
from tests.lower.openvino.decoders import CASES, Lowered, lowered, small_target  # noqa: E402

TOKENS = 2 * PREFILL + 5
VOCAB = 96
TIED = "llama, grouped queries, tied"


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lowered(tmp_path_factory.mktemp("openvino"), request.param)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lowered(tmp_path_factory.mktemp("biased"), "qwen2, groups")


@torch.no_grad()
def test_the_program_is_the_integer_reference(case: Lowered) -> None:
    """Logits bit for bit, with the runtime's own float operators between the linears; those are what they should be."""
    parts = ComparedParts(OpenvinoFloatParts(case.target, case.options))
    rung, ids = integer_rung(case.checkpoint, case.target, parts=parts), random_ids(VOCAB, TOKENS)
    expected = decoder.head(rung.head(), hidden_states(rung, ids[None]))[0]
    session = case.session()
    found = session.logits(ids)
    assert torch.equal(found, expected)
    assert parts.error < 1e-5
    check = kernels_check(session.nodes(), case.target, case.checkpoint)
    assert check.status == "passed", check.detail


def test_decoding_step_by_step_is_the_whole_sequence(case: Lowered) -> None:
    """Up to the order of float additions: a call of one token takes other kernels between the linears."""
    session, ids = case.session(), random_ids(VOCAB, 12)
    whole = session.logits(ids)
    steps = torch.cat([session.extend(ids[place : place + 1], place) for place in range(12)])
    assert (steps - whole).abs().max() < 2e-2 * whole.abs().max()
    assert (steps.argmax(-1) == whole.argmax(-1)).float().mean() > 0.9


def test_every_integer_is_read_back(case: Lowered) -> None:
    content = read_program(case.path)
    verify(case.checkpoint, case.target, content)
    assert set(content.linears) == set(case.checkpoint.records)
    for name, stored in content.linears.items():
        linear = case.checkpoint.linear(name)
        assert np.array_equal(stored.codes, linear.codes.numpy())
        assert np.array_equal(stored.scales, linear.scales.numpy())
        assert (stored.bias is None) == (linear.bias is None)
    assert content.facts == PROVENANCE
    assert content.properties == session_options(case.checkpoint.records, case.target)
    coverage = coverage_of(case.checkpoint, content)
    assert [line.name for line in coverage.lowered] == list(case.checkpoint.records)
    assert "ScaledDotProductAttention" in {line.what for line in coverage.refused}


def test_a_tied_table_is_in_the_file_once(tmp_path: Path) -> None:
    tied = lowered(tmp_path, TIED)
    names = [node.get_friendly_name() for node in read_model(tied.path).get_ops()]
    assert "lm_head.codes" in names and "embed_tokens.codes" not in names


def test_beams_are_put_in_order(tmp_path: Path) -> None:
    """`beam_idx` says whose cache a row goes on with."""
    case = lowered(tmp_path, TIED)
    request = compiled(case.path, case.options).create_infer_request()
    ids = torch.stack([random_ids(VOCAB, 6, seed) for seed in (0, 1)]).numpy()

    def call(ids: np.ndarray, past: int, beams: list[int]) -> np.ndarray:
        batch, tokens = ids.shape
        positions = np.broadcast_to(np.arange(past, past + tokens), (batch, tokens)).copy()
        given = {"input_ids": ids, "attention_mask": np.ones((batch, past + tokens), np.int64)}
        return request.infer(given | {"position_ids": positions, "beam_idx": np.array(beams, np.int32)})[
            "logits"
        ].copy()

    call(ids[:, :5], 0, [0, 1])
    crossed = call(ids[::-1, 5:].copy(), 5, [1, 0])
    request.reset_state()
    call(ids[:, :5], 0, [0, 1])
    straight = call(ids[:, 5:], 5, [0, 1])
    assert np.array_equal(crossed[::-1], straight)


def changed(case: Lowered, folder: Path, change: Callable[[openvino.Model], None]) -> Path:
    """A copy of a program that `change` was done to."""
    model = read_model(case.path)
    change(model)
    openvino.save_model(model, folder / "other.xml", compress_to_fp16=False)
    return folder / "other.xml"


def constant(name: str, place: int, value: float) -> Callable[[openvino.Model], None]:
    """Changes one number of the constant `name`."""

    def change(model: openvino.Model) -> None:
        node = next(node for node in model.get_ops() if node.get_friendly_name() == name)
        array = node.data.copy()
        array.reshape(-1)[place] += value
        tensor = openvino.Tensor(node.get_element_type(), node.shape)
        tensor.data[...] = array
        other = openvino.opset15.constant(tensor)
        other.set_friendly_name(name)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(other.output(0))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (constant("blocks.1.up_proj.codes", 7, 1), r"not the checkpoint \[blocks.1.up_proj\]: codes differ"),
        (constant("blocks.0.o_proj.scales", 0, 1e-8), r"not the checkpoint \[blocks.0.o_proj\]: scales differ"),
        (constant("blocks.0.q_proj.bias", 3, 1e-6), r"not the checkpoint \[blocks.0.q_proj\]: bias differs"),
        (constant("embed_tokens.codes", 5, 1), r"not the checkpoint \[embed_tokens\]: codes differ"),
        (constant("head.final_norm.weight", 0, 1e-6), r"not the checkpoint \[head.final_norm.weight\]"),
        (constant("rope.cos", 9, 1e-6), r"not the checkpoint \[rope.cos\]"),
        (
            lambda model: model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]),
            "properties are not the target's",
        ),
    ],
)
def test_another_number_is_found(
    biased: Lowered, tmp_path: Path, change: Callable[[openvino.Model], None], said: str
) -> None:
    path = changed(biased, tmp_path, change)
    with pytest.raises(VerdictError, match=said):
        verify(biased.checkpoint, biased.target, read_program(path))


def test_a_linear_that_runs_otherwise_is_found(biased: Lowered) -> None:
    session = biased.session()
    session.logits(random_ids(VOCAB, 4))
    nodes = session.nodes()
    other = kernels_check(nodes | {"blocks.0.v_proj.biased": nodes["lm_head"]}, biased.target, biased.checkpoint)
    assert other.status == "failed"
    assert other.detail.endswith("blocks.0.v_proj ran as FullyConnected i8 instead of FullyConnected i4")
    none = kernels_check({}, biased.target, biased.checkpoint)
    assert none.status == "failed" and "blocks.0.q_proj ran as nothing" in none.detail


def test_a_file_without_its_tensors_is_refused(biased: Lowered, tmp_path: Path) -> None:
    shutil.copy(biased.path, tmp_path / "openvino_model.xml")
    with pytest.raises(InputError, match="cannot read the program"):
        read_program(tmp_path / "openvino_model.xml")


@pytest.mark.parametrize(
    ("scheme", "changes", "said"),
    [
        ("w8a8-static", (), "takes dynamic activations, not static"),
        ("w4a8-g32", ("weights.group=16", 'fallback="refuse"'), "takes groups of 32/64/128, not 16"),
        ("w4a8", ("activations.bits=16",), "takes 8-bit activations, not 16"),
        ("w4a8", ("weights.symmetric=false", "weights.group=0"), "symmetric weights only"),
    ],
)
def test_what_the_plugin_does_not_run_right_is_refused(scheme: str, changes: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        assign(decoder_config(), load_recipe(scheme, changes), load_target("intel-openvino"))


@pytest.mark.parametrize(("changes", "said"), [({"intermediate": 33}, "multiple of 2"), ({"hidden": 28}, "32 inputs")])
def test_widths_that_fall_back_silently_are_refused(changes: dict[str, int], said: str) -> None:
    config = decoder_config("opt", **changes)
    with pytest.raises(InputError, match=said):
        assign(config, load_recipe("w4a8"), load_target("intel-openvino"))


def test_a_device_that_is_not_here_is_named() -> None:
    target = small_target()
    npu = msgspec.structs.replace(target, openvino=msgspec.structs.replace(target.openvino, device="NPU"))
    with pytest.raises(MissingToolError, match=r"no such device here \[NPU\]: there are: CPU"):
        refuse(npu, {})
    with pytest.raises(InputError, match=r"no \[openvino\] table"):
        refuse(msgspec.structs.replace(target, openvino=None), {})


def test_a_property_that_the_plugin_does_not_know_is_refused(biased: Lowered) -> None:
    with pytest.raises(InputError, match="Unsupported property NONSENSE"):
        compiled(biased.path, RunOptions({"NONSENSE": "1"}))


def test_the_file_carries_all_its_properties_but_one(biased: Lowered) -> None:
    """The trap: opened without openvino_properties.json, the plugin takes what the file says, except the precision."""
    alone = compiled(biased.path, RunOptions({}))
    found = {key: str(alone.get_property(key)) for key in biased.content.properties}
    assert found["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "32" and "float32" in found["KV_CACHE_PRECISION"]
    unasked = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    assert alone.get_property("INFERENCE_PRECISION_HINT") == unasked
