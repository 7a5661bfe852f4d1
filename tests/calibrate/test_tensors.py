"""Grids of every tensor: which there are, what they cover, and that learning sees them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afq_export.calibrate.result import read_outer
from afq_export.calibrate.tensors import TensorGrids
from afq_export.quantize.activations import fake_quantize_static
from afq_export.quantize.checkpoint import QuantizedCheckpoint, open_checkpoint
from afq_export.quantize.grid import LARGEST_STEP, block_steps, round_scales
from afq_export.quantize.tensors import TensorBits
from afq_export.spec.quant import ScaleType
from tests.models import llama_config
from tests.static_checkpoints import static_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return static_checkpoint(tmp_path_factory.mktemp("static"), "w8a16-static+rtn")[1]


def test_every_tensor_has_a_grid_and_they_are_kept(checkpoint: QuantizedCheckpoint) -> None:
    again = open_checkpoint(checkpoint.folder)
    assert again.tensors == checkpoint.tensors
    assert set(checkpoint.outer_tensors()) == {"hidden", "final_norm", "lm_head"}
    assert len(checkpoint.block_tensors(0)) == 29 and set(checkpoint.block_tensors(0)) == set(
        checkpoint.block_tensors(1)
    )
    assert set(read_outer(checkpoint.folder.parent / "calibration")) == {"hidden", "final_norm", "lm_head"}


def test_linears_have_the_grids_of_what_they_take_and_give(checkpoint: QuantizedCheckpoint) -> None:
    for name, record in checkpoint.records.items():
        grids = checkpoint.tensors if record.spec.block is None else checkpoint.block_tensors(record.spec.block)
        assert record.output == grids[record.spec.role], name
    tensors = checkpoint.block_tensors(1)
    assert checkpoint.records["blocks.1.q_proj"].input == tensors["attn_norm"]
    assert checkpoint.records["blocks.1.o_proj"].input == tensors["attended"]
    assert checkpoint.records["lm_head"].input == checkpoint.tensors["final_norm"]


def test_bits_and_fixed_grids(checkpoint: QuantizedCheckpoint) -> None:
    tensors = checkpoint.block_tensors(0)
    assert {tensors[name].bits for name in ("keys", "values")} == {8}
    assert {grid.bits for name, grid in tensors.items() if name not in ("keys", "values")} == {16}
    assert tensors["keys"].zero_point == tensors["values"].zero_point == tensors["cos"].zero_point == 0
    assert tensors["probabilities"].scale == 2**-16 and tensors["probabilities"].zero_point == -(2**15)
    assert tensors["scores"] == tensors["masked"]


def test_no_row_of_the_table_leaves_the_grid_of_the_input(checkpoint: QuantizedCheckpoint) -> None:
    rows, grid = checkpoint.embedding().dequantized(), checkpoint.tensors["hidden"]
    assert float((fake_quantize_static(rows, grid) - rows).abs().max()) <= grid.scale


def test_eight_bits_keep_the_cache_on_the_grid_it_is_made_on(tmp_path: Path) -> None:
    _, made = static_checkpoint(tmp_path, "w8a8-static+rtn")
    tensors = made.block_tensors(0)
    assert tensors["keys"] == tensors["k_rotated"] and tensors["values"] == tensors["v_proj"]


def test_the_lowest_score_is_no_probability() -> None:
    """A score at the grid's low end beside the lowest of the rows' largest: nothing is left of it, in all bits."""
    grids = TensorGrids(llama_config(), TensorBits(8, 8), observe=True)
    scores = torch.randn(1, 4, 10, 10, generator=torch.Generator().manual_seed(0)) * 20
    grids("masked", scores)
    grid = grids.found("minmax", {})["masked"]
    low = (grid.qmin - grid.zero_point) * grid.scale
    largest = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf).amax(-1).min()
    assert 10 * math.exp(low - float(largest)) <= 2**-8 * math.exp(grid.scale)


def test_gradients_pass_to_what_is_learned() -> None:
    grids, x = TensorGrids(llama_config(), TensorBits(8, 8)), torch.randn(2, 5, 8, requires_grad=True)
    grids("gated", x).sum().backward()
    assert float(x.grad.mean()) > 0.9 and set(x.grad.unique().tolist()) <= {0.0, 1.0}, "1 inside of the grid"


def test_learning_sees_the_grids(tmp_path: Path) -> None:
    """Transforms and clipping are learned with every tensor on a grid: the losses of 4-bit and 16-bit grids differ."""
    few = ("learning.epochs=1", "learning.batch=2")
    for name, scheme in (("eight", "w8a8-static"), ("sixteen", "w8a16-static")):
        (tmp_path / name).mkdir()
        static_checkpoint(tmp_path / name, f"{scheme}+affinequant", few)
    losses = [(tmp_path / name / "calibration" / "block-000.safetensors").read_bytes() for name in ("eight", "sixteen")]
    assert losses[0] != losses[1]


@given(st.lists(st.floats(2.0**-60, 2.0**30, width=32), min_size=1, max_size=40))
def test_scales_in_steps_are_exact_and_stay_what_they_are(values: list[float]) -> None:
    scales = torch.tensor([values])
    rounded = round_scales(scales, ScaleType.STEPS)
    steps, unit = block_steps(rounded)
    assert torch.equal(steps.float() * unit, rounded), "what the file says is what was quantized with"
    assert torch.equal(round_scales(rounded, ScaleType.STEPS), rounded)
    assert int(steps.min()) >= 1 and int(steps.max()) == LARGEST_STEP
    big = scales >= scales.max() / LARGEST_STEP
    assert ((rounded / scales)[big] - 1).abs().max() <= 0.5, "half a step, of one step at least"
