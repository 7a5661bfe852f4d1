"""End-to-end learning: what is learned is what is quantized, it comes nearer, it never leaves anything worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.calibrate.calibrate import calibrate
from afq_export.calibrate.end_to_end import hold_out, refuse_end_to_end, tune
from afq_export.calibrate.result import Calibration, tuned_path, write_tuned
from afq_export.calibrate.student import student_of
from afq_export.errors import InputError
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.model import open_model
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.quantize.grid import clipped_scales, group_peaks, moved_codes, scale_codes, weight_codes, weight_scales
from afq_export.quantize.quantize import quantize_block
from afq_export.report.tables import tuning_lines
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.quant import Granularity, QuantSpec, ScaleType
from afq_export.spec.recipe import Recipe
from tests.calibrate.test_rounding import windows
from tests.models import write_model

TARGET = load_target("android-xnnpack")
IDS = torch.randint(0, 256, (40, 24), generator=torch.Generator().manual_seed(9))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    inputs=st.integers(1, 70),
    group=st.sampled_from([0, 16, 32]),
    scale_type=st.sampled_from([ScaleType.FLOAT32, ScaleType.BFLOAT16]),
    seed=st.integers(0, 99),
)
def test_scales_of_peaks_are_those_of_the_weight_and_their_gradient_is_the_codes_share(
    inputs: int, group: int, scale_type: ScaleType, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    granularity = Granularity.PER_GROUP if group else Granularity.PER_CHANNEL
    spec = QuantSpec(4, granularity, group=group, scale_type=scale_type)
    weight = torch.randn(3, inputs, generator=generator)
    clip = torch.rand(3, spec.groups(inputs), generator=generator) + 0.3
    scales = weight_scales(weight, clip, spec)
    assert torch.equal(clipped_scales(group_peaks(weight, spec), clip, spec), scales)
    codes, leaf = weight_codes(weight, scales, spec), scales.clone().requires_grad_()
    columns = scales.repeat_interleave(group or inputs, 1)[:, :inputs]
    values = scale_codes(codes, leaf, spec)
    assert torch.equal(values, codes.float() * columns)
    upstream = torch.randn(3, inputs, generator=generator)
    (values * upstream).sum().backward()
    share = torch.zeros(3, spec.groups(inputs))
    for column in range(inputs):
        share[:, column // (group or inputs)] += upstream[:, column] * codes[:, column]
    torch.testing.assert_close(leaf.grad, share)


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FloatCheckpoint:
    return open_model(str(write_model(tmp_path_factory.mktemp("model") / request.param, request.param)))


def calibrated(model: FloatCheckpoint, folder: Path, *changes: str) -> tuple[Recipe, Calibration]:
    recipe = load_recipe(
        "w4a8-g32+awq", ("end_to_end.steps=40", "end_to_end.scale_rate=1e-3", "end_to_end.gain_rate=1e-3", *changes)
    )
    return recipe, calibrate(model, recipe, assign(model.config, recipe, TARGET), windows(), folder, 0, silent)


def dequantized(model: FloatCheckpoint, recipe: Recipe, calibration: Calibration, index: int) -> dict:
    records = assign(model.config, recipe, TARGET)
    folded = FoldedCheckpoint(model, calibration.transforms())
    part = quantize_block(folded, calibration.block(index), records, index)
    weights = {f"{linear.spec.role}.weight": linear.dequantized() for linear in part.linears}
    return weights | {name.removeprefix("float."): tensor for name, tensor in part.floats.items()}


@pytest.mark.parametrize("change", ["rounding.method=nearest", "rounding.method=gptq", "activations.mode=static"])
def test_what_is_learned_is_to_the_bit_what_is_quantized(model: FloatCheckpoint, tmp_path: Path, change: str) -> None:
    recipe, calibration = calibrated(model, tmp_path, change, "fallback=int8")
    records = assign(model.config, recipe, TARGET)
    before = student_of(model, recipe, records, calibration).weights()
    for index in range(model.config.layers):
        for name, tensor in dequantized(model, recipe, calibration, index).items():
            assert torch.equal(before[index][name], tensor), name
    tuned = tune(model, recipe, records, calibration, IDS, windows().ids_NT, 0, silent)
    assert tuned.history.kept and tuned.history.after < tuned.history.before
    write_tuned(tmp_path, tuned)
    changed = 0
    after = student_of(model, recipe, records, calibration).weights()
    for index in range(model.config.layers):
        for name, tensor in dequantized(model, recipe, calibration, index).items():
            assert torch.equal(after[index][name], tensor), name
            changed += not torch.equal(before[index][name], tensor)
        codes = tuned.blocks[index].codes
        assert codes and all(code.dtype == torch.int8 for code in codes.values())
    assert changed
    assert calibration.outer_floats().keys() == tuned.outer.keys() and calibration.tuning() == tuned.history


@settings(max_examples=25, deadline=None, derandomize=True)
@given(inputs=st.integers(1, 70), group=st.sampled_from([0, 16, 32]), seed=st.integers(0, 99))
def test_moved_codes_are_rounded_and_clamped_and_offsets_get_the_scale_as_slope(
    inputs: int, group: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    spec = QuantSpec(4, Granularity.PER_GROUP if group else Granularity.PER_CHANNEL, group=group)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (3, inputs), generator=random, dtype=torch.int8)
    offsets = (3 * torch.randn(3, inputs, generator=random)).requires_grad_()
    scales = torch.rand(3, spec.groups(inputs), generator=random) + 0.3
    moved = moved_codes(codes, offsets, spec)
    for row in range(3):
        for column in range(inputs):
            there = int(codes[row, column]) + round(float(offsets.detach()[row, column]))
            assert int(moved[row, column]) == min(max(there, spec.qmin), spec.qmax)
    values, upstream = scale_codes(codes, scales, spec, offsets), torch.randn(3, inputs, generator=random)
    assert torch.equal(values, scale_codes(moved, scales, spec))
    (values * upstream).sum().backward()
    columns = scales.repeat_interleave(group or inputs, 1)[:, :inputs]
    assert torch.equal(offsets.grad, upstream * columns)


def test_offsets_begin_where_the_folded_weights_were(model: FloatCheckpoint, tmp_path: Path) -> None:
    recipe, calibration = calibrated(model, tmp_path, "rounding.method=gptq", "end_to_end.code_rate=1e-3")
    student, apart = student_of(model, recipe, assign(model.config, recipe, TARGET), calibration), 0
    folded = FoldedCheckpoint(model, calibration.transforms())
    for index, part in enumerate(student.blocks):
        weights = folded.block(index)
        for role, offsets in part.offsets.items():
            spec = part.records[role].spec.weight
            scales = clipped_scales(part.peaks[role], part.clip(role), spec).detach()
            columns = scales.repeat_interleave(spec.group or offsets.shape[1], 1)[:, : offsets.shape[1]]
            steps = weights[f"{role}.weight"] / columns - part.codes[role]
            near = steps.abs() < 0.5
            torch.testing.assert_close(offsets.detach()[near], steps[near], rtol=0, atol=1e-5)
            assert not offsets.detach()[~near].any()
            apart += int((~near).sum())
    assert apart, "GPTQ sends some weights past their nearest codes"


@pytest.mark.parametrize("change", ["rounding.method=nearest", "rounding.method=gptq"])
def test_codes_move_where_the_recipe_has_a_rate_for_them(model: FloatCheckpoint, tmp_path: Path, change: str) -> None:
    """By a step at most at such rates, and they are what is quantized, to the bit."""
    recipe, calibration = calibrated(model, tmp_path, change, "end_to_end.code_rate=2e-3")
    records = assign(model.config, recipe, TARGET)
    rounded = student_of(model, recipe, records, calibration)
    tuned = tune(model, recipe, records, calibration, IDS, windows().ids_NT, 0, silent)
    assert tuned.history.kept and tuned.history.after < tuned.history.before
    moved = 0
    for result, part in zip(tuned.blocks, rounded.blocks, strict=True):
        for role, codes in result.codes.items():
            steps = codes.int() - part.codes[role].int()
            assert codes.dtype == torch.int8 and int(steps.abs().max()) <= 1
            moved += int(steps.ne(0).sum())
    assert moved
    write_tuned(tmp_path, tuned)
    for index, result in enumerate(tuned.blocks):
        linears = quantize_block(FoldedCheckpoint(model, calibration.transforms()), result, records, index).linears
        assert all(torch.equal(linear.codes, result.codes[linear.spec.role]) for linear in linears)


def test_codes_stand(model: FloatCheckpoint, tmp_path: Path) -> None:
    recipe, calibration = calibrated(model, tmp_path, "rounding.method=gptq")
    tuned = tune(model, recipe, assign(model.config, recipe, TARGET), calibration, IDS, windows().ids_NT, 0, silent)
    for index, result in enumerate(tuned.blocks):
        before = calibration.block(index)
        assert all(torch.equal(codes, before.codes[role]) for role, codes in result.codes.items())
        assert any(not torch.equal(clip, before.clips[role]) for role, clip in result.clips.items())


def test_the_same_seed_gives_the_same_bytes(model: FloatCheckpoint, tmp_path: Path) -> None:
    recipe, calibration = calibrated(model, tmp_path)
    records = assign(model.config, recipe, TARGET)
    tuned = [tune(model, recipe, records, calibration, IDS, windows().ids_NT, 3, silent) for _ in range(2)]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, result in zip(folders, tuned, strict=True):
        write_tuned(folder, result)
    for path in sorted(tuned_path(folders[0]).iterdir()):
        assert path.read_bytes() == (tuned_path(folders[1]) / path.name).read_bytes()


@pytest.mark.parametrize("rate", ["0", "5"])
def test_what_has_not_become_better_is_left_as_it_was(model: FloatCheckpoint, tmp_path: Path, rate: str) -> None:
    rates = (f"end_to_end.scale_rate={rate}", f"end_to_end.gain_rate={rate}")
    recipe, calibration = calibrated(model, tmp_path, *rates)
    tuned = tune(model, recipe, assign(model.config, recipe, TARGET), calibration, IDS, windows().ids_NT, 0, silent)
    assert not tuned.history.kept and not tuned.outer
    for index, result in enumerate(tuned.blocks):
        before = calibration.block(index)
        assert not result.floats
        assert all(torch.equal(clip, before.clips[role]) for role, clip in result.clips.items())


def test_a_target_with_every_tensor_on_a_grid_is_refused() -> None:
    recipe = load_recipe("w8a16-static+awq", ("end_to_end.steps=1",))
    refuse_end_to_end(recipe, TARGET)
    with pytest.raises(InputError, match="nothing end to end"):
        refuse_end_to_end(recipe, load_target("android-qnn-htp"))


@given(fresh=st.integers(0, 30), seen=st.integers(1, 20))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_windows_held_out_are_such_that_nothing_has_seen(fresh: int, seen: int) -> None:
    ids = torch.arange((fresh + seen) * 2).view(-1, 2)
    held, rest = hold_out(ids, ids[:seen])
    if fresh:
        assert int(held.min()) >= seen and len(held) == min(8, -(-fresh // 8))
        assert sorted([*held.tolist(), *rest.tolist()]) == list(range(fresh + seen))
    assert len(held) and len(rest)


def test_learning_that_diverges_leaves_everything_as_it_was(model: FloatCheckpoint, tmp_path: Path) -> None:
    """And says so in a file that can be read: JSON has no NaN."""
    recipe, calibration = calibrated(model, tmp_path, "end_to_end.scale_rate=1e30", "end_to_end.steps=4")
    records = assign(model.config, recipe, TARGET)
    before = student_of(model, recipe, records, calibration).weights()
    write_tuned(tmp_path, tune(model, recipe, records, calibration, IDS, windows().ids_NT, 0, silent))
    history = calibration.tuning()
    assert history.after is None and not history.kept and 0 < len(history.losses) < 4
    assert "not a finite number after: no better" in tuning_lines(history)[0]
    after = student_of(model, recipe, records, calibration).weights()
    assert all(torch.equal(before[i][name], tensor) for i, found in enumerate(after) for name, tensor in found.items())
