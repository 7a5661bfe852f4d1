"""Static activation ranges: which tensors get a grid, and what each method covers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from afq_export.calibrate.calibrate import calibrate
from afq_export.calibrate.observer import OUTSIDE, SAMPLES, SHRINKS, Observer
from afq_export.calibrate.result import Calibration, block_path, read_block
from afq_export.errors import InputError
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.corpus import Windows
from afq_export.load.model import open_model
from afq_export.progress import silent
from afq_export.quantize.activations import dequantize_static, quantize_static, range_grid
from afq_export.quantize.assign import assign
from afq_export.quantize.checkpoint import StaticRange
from afq_export.spec.catalog import load_recipe, load_target
from tests.models import write_model


def observed(*batches: torch.Tensor) -> Observer:
    observer = Observer()
    for batch in batches:
        observer.see(batch)
    return observer


def noise(count: int = 20_000, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_extremes_are_exact_over_all_batches() -> None:
    """Also those that the sample leaves out."""
    x = noise(3 * SAMPLES)
    x[1], x[-2] = -40, 31
    grid = observed(x, noise(seed=1)).grid("minmax")
    assert grid == range_grid(-40, 31)
    assert observed(torch.full((4,), 2.0)).grid("minmax") == range_grid(0, 2), "zero has a code, always"


def test_a_percentile_leaves_out_the_ends() -> None:
    x = noise(40_000)
    ordered, count = x.sort().values, int(40_000 * OUTSIDE)
    assert count == 4
    assert observed(x).grid("percentile") == range_grid(float(ordered[count]), float(ordered[-1 - count]))


@pytest.mark.parametrize("outliers", [1, 2])
def test_few_outliers_do_not_move_a_percentile(outliers: int) -> None:
    x = noise(40_000)
    calm = observed(x).grid("percentile")
    x[:outliers] = 1e4
    wild = observed(x).grid("percentile")
    assert wild.scale < 1.2 * calm.scale
    assert observed(x).grid("minmax").scale > 1000 * calm.scale


def test_a_percentile_of_little_is_the_whole_range() -> None:
    x = noise(500)
    assert observed(x).grid("percentile") == observed(x).grid("minmax")
    assert observed(torch.zeros(3)).grid("percentile").scale > 0


def test_the_least_error_is_the_least_of_those_tried() -> None:
    x = noise() ** 3
    observer = observed(x)
    ends = [max(-observer.low, observer.high) * shrink for shrink in SHRINKS]
    grids = [range_grid(max(observer.low, -end), min(observer.high, end)) for end in ends]
    errors = [float((dequantize_static(quantize_static(x, grid), grid) - x).square().mean()) for grid in grids]
    assert observer.grid("mse") == grids[errors.index(min(errors))]
    assert observer.grid("mse").scale < observer.grid("minmax").scale
    assert (SHRINKS[0], SHRINKS[-1]) == (1.0, pytest.approx(0.2))


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
def test_every_method_gives_a_grid_that_has_zero(method: str) -> None:
    for x in (noise(), noise().abs(), -noise().abs() - 5, torch.zeros(9), torch.full((9,), 1e-42)):
        grid = observed(x).grid(method)
        assert isinstance(grid, StaticRange) and grid.scale > 0
        assert -128 <= grid.zero_point <= 127
        assert dequantize_static(quantize_static(torch.zeros(1), grid), grid).item() == 0


# Of a whole model


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FloatCheckpoint:
    return open_model(str(write_model(tmp_path_factory.mktemp("model") / request.param, request.param)))


def calibrated(model: FloatCheckpoint, target: str, folder: Path, *changes: str) -> Calibration:
    recipe = load_recipe("w8a8-static+rtn", changes)
    records = assign(model.config, recipe, load_target(target))
    ids = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(5))
    return calibrate(model, recipe, records, Windows(ids, "random", "-", 16, 4, "-", 16), folder, 0, silent)


def test_outputs_have_a_grid_where_the_kernel_keeps_one(model: FloatCheckpoint, tmp_path: Path) -> None:
    """ONNX Runtime's MatMulIntegerToFloat does not, XNNPACK's static kernel does; the bytes read back say the same."""
    for target, kept in (("linux-x64-ort", False), ("android-xnnpack", True)):
        ranges = calibrated(model, target, tmp_path / target).block(1).ranges
        assert len(ranges) == (7 if model.config.family == "llama" else 6)
        assert all((after is not None) == kept for _, after in ranges.values())
        assert read_block(block_path(tmp_path / target, 1)).ranges == ranges


def test_an_output_grid_is_a_matter_of_the_recipe(tmp_path: Path, model: FloatCheckpoint) -> None:
    """QLinearMatMul takes no bias: a Llama has none, and OPT is refused."""
    asked = 'activations.output="static"'
    if model.config.family == "opt":
        with pytest.raises(InputError, match="QLinearMatMul takes no bias"):
            calibrated(model, "linux-x64-ort", tmp_path, asked)
        return
    ranges = calibrated(model, "linux-x64-ort", tmp_path, asked).block(0).ranges
    assert all(isinstance(after, StaticRange) for _, after in ranges.values())


def test_linears_with_one_input_have_one_input_grid(model: FloatCheckpoint, tmp_path: Path) -> None:
    """So that the file quantizes it once."""
    ranges = calibrated(model, "linux-x64-ort", tmp_path).block(0).ranges
    assert ranges["q_proj"][0] == ranges["k_proj"][0] == ranges["v_proj"][0] != ranges["o_proj"][0]


def test_no_method_covers_more_than_the_extremes(model: FloatCheckpoint, tmp_path: Path) -> None:
    """And the same tensors have a grid."""
    found = {
        method: calibrated(model, "linux-x64-ort", tmp_path / method, f"ranges.method={method}").block(0).ranges
        for method in ("minmax", "mse", "percentile")
    }
    assert found["minmax"].keys() == found["mse"].keys() == found["percentile"].keys()
    for role, (widest, _) in found["minmax"].items():
        assert found["mse"][role][0].scale <= widest.scale
        assert found["percentile"][role][0].scale <= widest.scale


def test_only_static_linears_are_observed(model: FloatCheckpoint, tmp_path: Path) -> None:
    change = 'override=[{pattern="blocks.0.*", activations="dynamic"}]'
    calibration = calibrated(model, "linux-x64-ort", tmp_path, change)
    assert not calibration.block(0).ranges and calibration.block(1).ranges


def test_the_range_for_an_output_keeps_the_outliers_that_the_linears_live_on() -> None:
    """One channel is large and rare; a linear that reads it needs it, a linear that does not can have fine steps."""
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    x[::64, 3] = 60.0
    observer = observed(x)
    reads, ignores = torch.zeros(4, 8), torch.ones(4, 8)
    reads[:, 3], ignores[:, 3] = 1.0, 0.0
    assert observer.grid_for([reads]).scale > 0.9 * observer.grid("minmax").scale
    assert observer.grid_for([ignores]).scale < 0.3 * observer.grid("minmax").scale
    assert observer.grid_for([ignores, reads]).scale > 0.9 * observer.grid("minmax").scale
