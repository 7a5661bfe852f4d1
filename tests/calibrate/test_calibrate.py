"""The calibrate stage: it helps, it is exact, it resumes to the same bytes, and divergence is handled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
import torch

from afq_export.arch.decoder import block, embed
from afq_export.arch.ops import FloatOps
from afq_export.calibrate import calibrate as stage
from afq_export.calibrate import learn
from afq_export.calibrate.calibrate import calibrate
from afq_export.calibrate.mask import gradual_mask
from afq_export.calibrate.parameters import SiteParameters
from afq_export.calibrate.result import Calibration, block_path, read_block, write_block
from afq_export.errors import InputError
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.fold.forms import choose_forms
from afq_export.fold.transform import SiteTransform
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.corpus import Windows
from afq_export.load.model import open_model
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.recipe import Transforms
from afq_export.spec.sites import Form
from tests.models import write_model

TARGET = load_target("android-xnnpack")
CHANGES = ("learning.epochs=4", "learning.batch=2")


@pytest.fixture(scope="module", params=["llama", "llama-biased", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FloatCheckpoint:
    return open_model(str(write_model(tmp_path_factory.mktemp("model") / request.param, request.param)))


def windows() -> Windows:
    ids = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(5))
    return Windows(ids, "random", "-", 24, 6, "-", 24)


def run(model: FloatCheckpoint, recipe: str, folder: Path, *changes: str) -> Calibration:
    parsed = load_recipe(recipe)
    if parsed.learning.epochs:
        parsed = load_recipe(recipe, CHANGES + changes)
    records = assign(model.config, parsed, TARGET)
    return calibrate(model, parsed, records, windows(), folder, 0, silent)


def relative_logit_error(model: FloatCheckpoint, calibration: Calibration) -> float:
    folded = FoldedCheckpoint(model, calibration.transforms())
    outputs = []
    for weights in (model, folded):
        x = embed(model.config, weights.embedding(torch.float64), windows().ids_NT[:1])
        for index in range(model.config.layers):
            x = block(model.config, FloatOps(model.config, weights.block(index, torch.float64)), x)
        outputs.append(x)
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())


@pytest.mark.parametrize("method", ["affinequant", "omniquant", "smoothquant", "awq", "rptq", "rtn"])
def test_every_method_folds_exactly_and_never_loses_to_its_start(
    model: FloatCheckpoint, tmp_path: Path, method: str
) -> None:
    calibration = run(model, f"w4a8-g32+{method}", tmp_path)
    assert relative_logit_error(model, calibration) < 1e-9
    for index in range(model.config.layers):
        history = calibration.block(index).history
        assert history.final_loss <= history.start_loss
        assert not any("rolled back" in event for event in history.events)
        if method == "rtn":
            assert history.final_loss == history.rounded_loss
        if method in ("affinequant", "omniquant"):
            assert history.final_loss < history.rounded_loss


def test_a_site_transform_is_the_masked_matrix_and_its_inverse(model: FloatCheckpoint) -> None:
    """A = diag(exp l) (I + M * mask): what is used, inverted and saved is the masked product, in both precisions."""
    choice = next(c for c in choose_forms(model.config, Transforms(v_to_o="affine")) if c.form is Form.PER_HEAD)
    heads, d = choice.site.heads, choice.site.head_dim
    site = SiteParameters(choice, torch.linspace(0.5, 2.0, choice.site.dim), None)
    site.off_diagonal.data = torch.randn(heads, d, d, generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        transform = site.transform(0.5, 0.1, dtype)
        mixed = torch.eye(d) + site.off_diagonal.detach() * gradual_mask(d, 0.5, 0.1).fill_diagonal_(0)
        expected = torch.linspace(0.5, 2.0, choice.site.dim).view(heads, d, 1) * mixed
        torch.testing.assert_close(transform.matrix.detach().float(), expected)
        identity = (transform.matrix @ transform.inverted()).detach()
        torch.testing.assert_close(identity, torch.eye(d, dtype=dtype).expand_as(identity), atol=tolerance, rtol=0)


def test_what_is_learned_is_recorded_per_epoch(model: FloatCheckpoint, tmp_path: Path) -> None:
    result = run(model, "w4a8", tmp_path).block(0)
    assert result.transforms["v_to_o"].form is Form.PER_HEAD
    assert result.transforms["v_to_o"].matrix.dtype is torch.float64
    diagonal = run(model, "w4a8+omniquant", tmp_path / "diagonal").block(0).transforms["v_to_o"]
    assert diagonal.form is Form.DIAGONAL
    assert [record.epoch for record in result.history.epochs] == [1, 2, 3, 4]
    assert all(0 < record.dominance <= 1 <= record.condition for record in result.history.epochs)


def test_a_stability_factor_of_zero_is_the_diagonal_method(model: FloatCheckpoint, tmp_path: Path) -> None:
    """AffineQuant with alpha = 0 and no q/k transform is OmniQuant: same losses, as long as steps are so small that the
    last bits, which differ, do not decide how weights round."""
    small = "learning.learning_rate=0.002", "learning.clipping_rate=0.005"
    no_matrices = "learning.stability_factor=0.0", "transforms.q_to_k=off"
    zero = run(model, "w4a8+affinequant", tmp_path / "a", *no_matrices, *small)
    diagonal = run(model, "w4a8+omniquant", tmp_path / "b", *small)
    for index in range(model.config.layers):
        one, two = zero.block(index).history.final_loss, diagonal.block(index).history.final_loss
        assert one == pytest.approx(two, rel=1e-2)


def test_static_ranges_are_found_for_every_linear(model: FloatCheckpoint, tmp_path: Path) -> None:
    ranges = run(model, "w8a8-static", tmp_path).block(1).ranges
    assert len(ranges) == (7 if model.config.family == "llama" else 6)
    assert all(-128 <= grid.zero_point <= 127 and grid.scale > 0 for pair in ranges.values() for grid in pair)


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(model: FloatCheckpoint, tmp_path: Path) -> None:
    whole = run(model, "w4a8-g32", tmp_path / "whole")

    def stop_in_block_2(label: str, done: int, total: int) -> None:
        if "block 2" in label and done == 2:
            raise KeyboardInterrupt

    parsed = load_recipe("w4a8-g32", CHANGES)
    records = assign(model.config, parsed, TARGET)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, parsed, records, windows(), tmp_path / "part", 0, stop_in_block_2)
    assert [p.name for p in sorted((tmp_path / "part").iterdir())] == ["block-000.safetensors"]
    run(model, "w4a8-g32", tmp_path / "part")
    for index in range(whole.layers):
        one, two = (block_path(tmp_path / name, index).read_bytes() for name in ("whole", "part"))
        assert one == two


def test_divergence_rolls_back_and_retries_with_a_smaller_factor(
    model: FloatCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("learning.learning_rate=5.0", "learning.stability_factor=1.0", "learning.epochs=6")
    calibration = run(model, "w4a8", tmp_path, *changes)
    events = [event for index in range(model.config.layers) for event in calibration.block(index).history.events]
    assert events and all("rolled back" in event for event in events)
    assert any("tried again with stability factor 0.1" in event for event in events)
    assert relative_logit_error(model, calibration) < 1e-6
    for index in range(model.config.layers):
        history = calibration.block(index).history
        assert history.final_loss <= history.start_loss


def test_a_nan_in_the_loss_keeps_the_start_values(
    model: FloatCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "block_loss", lambda y, targets, weights: y.mean() * float("nan"))
    for module in (learn, stage):
        monkeypatch.setattr(module, "measure", lambda *args: 1.0)
    history = run(model, "w4a8", tmp_path).block(0).history
    assert len(history.events) == learn.RETRIES + 1
    assert "not finite" in history.events[0] and "start values kept" in history.events[-1]


def test_no_number_that_is_not_finite_reaches_a_file(model: FloatCheckpoint, tmp_path: Path) -> None:
    result = run(model, "w4a8+rtn", tmp_path).block(0)
    transform = SiteTransform(Form.DIAGONAL, torch.tensor([float("nan")]))
    history = msgspec.structs.replace(result.history, final_loss=float("inf"))
    for change, where in (({"transforms": {"x": transform}}, r"matrix\.x"), ({"history": history}, "loss")):
        with pytest.raises(InputError, match=f"not finite.*{where}"):
            write_block(tmp_path / "bad.safetensors", dataclasses.replace(result, **change))
        assert not (tmp_path / "bad.safetensors").exists()


def test_a_block_file_reads_back_exactly(model: FloatCheckpoint, tmp_path: Path) -> None:
    result = run(model, "w8a8-static", tmp_path).block(0)
    write_block(tmp_path / "copy.safetensors", result)
    again = read_block(tmp_path / "copy.safetensors")
    assert again.history == result.history and again.ranges == result.ranges
    assert all(torch.equal(again.clips[role], clip) for role, clip in result.clips.items())
    assert all(torch.equal(again.transforms[n].matrix, t.matrix) for n, t in result.transforms.items())


def test_a_broken_block_file_is_one_clear_line(model: FloatCheckpoint, tmp_path: Path) -> None:
    calibration = run(model, "w4a8+rtn", tmp_path)
    path = block_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot read a block's calibration"):
        calibration.block(0)


def test_the_papers_own_norm_matrix_is_refused_with_the_reason(model: FloatCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not fold into a norm's gain"):
        run(model, "w4a8", tmp_path, "transforms.norm_to_linears=affine")
