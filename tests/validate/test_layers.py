"""What a layer report says about a runtime that is right, a step off, or broken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from afq_export.validate.integer.linear import integer_linear
from afq_export.validate.layers import check_layers, compare_layer, output_step, sqnr_db
from tests.checkpoints import (
    KERNELS,
    DequantizedWeights,
    random_checkpoint,
    random_linear,
    random_windows,
    small_config,
    xnnpack_target,
)

TARGET = xnnpack_target()


def model_probe(linears, inputs):
    """A runtime that computes what the integer models say."""
    return {
        linear.spec.name: integer_linear(
            TARGET.kernel(linear.record.kernel).arithmetic, linear, torch.from_numpy(inputs[linear.spec.name])
        ).numpy()
        for linear in linears
    }


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_linear_is_probed_in_running_order(tmp_path, kernel, kind):
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(kind), kernel)
    ids = random_windows(checkpoint.config).ids_NT[0]
    seen = []
    reports = check_layers(
        checkpoint,
        TARGET,
        ids,
        lambda linears, inputs: seen.append({n: x.shape for n, x in inputs.items()}) or model_probe(linears, inputs),
        DequantizedWeights(checkpoint),
    )
    assert [report.name for report in reports] == list(checkpoint.records)
    assert all(report.exact and report.passed and report.max_steps == 0 for report in reports)
    # The static grids of random weights saturate; a layer's float output is still far above its error.
    assert all((3 if kernel == "qs8-qc8w" else 20) < report.sqnr_db < 120 for report in reports)
    assert [len(call) for call in seen] == [len(checkpoint.block(0))] * 2 + [1]
    assert seen[0]["blocks.0.q_proj"] == (16, 64)


def test_inputs_are_those_of_the_integer_rung(tmp_path):
    """The first linear's input is the normed embedding; the second block sees what the first one's integers gave."""
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config())
    ids = random_windows(checkpoint.config).ids_NT[0]
    inputs = {}
    check_layers(checkpoint, TARGET, ids, lambda linears, x: inputs.update(x) or model_probe(linears, x))
    rows = checkpoint.embedding().dequantized()[ids]
    gain = checkpoint.block_floats(0)["attn_norm.weight"]
    normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5) * gain
    assert np.allclose(inputs["blocks.0.q_proj"], normed, rtol=1e-6)
    assert (inputs["blocks.0.q_proj"] == inputs["blocks.0.v_proj"]).all()
    assert not np.allclose(inputs["blocks.0.q_proj"], inputs["blocks.1.q_proj"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_wrong_code_is_one_step(kernel):
    """Changing one weight code by one moves each output by its activation's distance from the zero point, in steps."""
    linear = random_linear(kernel, 24, 64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    theirs = integer_linear(TARGET.kernel(kernel).arithmetic, linear, x)
    theirs[2, 3] += float(output_step(linear, x).expand(5, 24)[2, 3])
    report = compare_layer(linear, TARGET.kernel(kernel), x, theirs)
    assert not report.exact
    assert not report.passed
    assert report.max_steps == pytest.approx(1, rel=0.02)
    assert report.sqnr_db is None


def test_last_bits_pass_only_where_the_target_allows_them():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for kernel, passed in (("qd8-f32-qb4w", True), ("qd8-f32-qc4w", False)):
        linear = random_linear(kernel, 24, 64)
        theirs = integer_linear(TARGET.kernel(kernel).arithmetic, linear, x)
        theirs[0, 0] = torch.nextafter(theirs[0, 0], torch.tensor(9e9))
        report = compare_layer(linear, TARGET.kernel(kernel), x, theirs)
        assert (report.exact, report.passed) == (False, passed)
        assert 0 < report.max_steps < 0.5


def test_nan_from_the_runtime_fails():
    linear, x = random_linear("qd8-f32-qb4w"), torch.ones(2, 64)
    theirs = integer_linear("xnnpack.dynamic_per_group", linear, x)
    theirs[1, 1] = math.nan
    report = compare_layer(linear, TARGET.kernel("qd8-f32-qb4w"), x, theirs)
    assert (report.passed, report.max_steps) == (False, None)


def test_sqnr_is_a_power_ratio():
    x, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert sqnr_db(x, weight, None, weight.t() * 1.1) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(x, weight, torch.ones(2), weight.t() + 1) == math.inf
