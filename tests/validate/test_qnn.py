"""The HTP's linears: our model of them against the simulator."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from afq_export.backends import qnn
from afq_export.errors import InputError
from afq_export.lower.qnn.probe import run_linears
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear, StaticRange
from afq_export.validate.htp import rounded_down
from afq_export.validate.integer.qnn import static, whole_weights
from afq_export.validate.layers import compare_layer
from tests.runtime.test_qnn import OPTIONS
from tests.static_checkpoints import htp_target, static_checkpoint

SCHEMES = ["w8a16-static", "w4a16-static", "w4a16-static-g32", "w8a8-static"]


@pytest.fixture(scope="module", params=SCHEMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return static_checkpoint(tmp_path_factory.mktemp(request.param), f"{request.param}+rtn")[1]


def codes_in(linear: QuantizedLinear, tokens: int = 48) -> torch.Tensor:
    """Inputs all over the grid of the linear, its ends included."""
    grid, generator = linear.record.input, torch.Generator().manual_seed(3)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (tokens, linear.spec.inputs), generator=generator)
    codes[0], codes[1] = grid.qmin, grid.qmax
    return (codes - grid.zero_point) * torch.tensor(grid.scale, dtype=torch.float32)


def test_the_model_is_whole_numbers(checkpoint: QuantizedCheckpoint) -> None:
    """The same with numpy's int64 from the definition: no float decides before the last rounding."""
    linear = checkpoint.linear("blocks.0.gate_proj")
    source, target = linear.record.input, linear.record.output
    x = codes_in(linear)
    codes = np.rint(x.double().numpy() / np.float32(source.scale)).astype(np.int64) + source.zero_point - source.qmin
    zero = source.zero_point - source.qmin
    weights, scales = (part.double().numpy() for part in whole_weights(linear))
    weights = weights.astype(np.int64)
    sums, zeros = codes @ weights.T, zero * weights.sum(1)
    whole = 256 * (sums // 256 - (zeros + 128) // 256) if source.bits == 16 else sums - zeros
    expected = np.rint(whole * (source.scale * scales / target.scale)) + target.zero_point
    found = static(linear, x).double().numpy() / np.float32(target.scale) + target.zero_point
    assert np.array_equal(np.rint(found), np.clip(expected, target.qmin, target.qmax))


def test_the_simulator_is_at_most_a_step_away(checkpoint: QuantizedCheckpoint) -> None:
    """And nearly always on the very code. Without the cut of the sums' last byte it would be tens of steps."""
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra [qnn]")
    target = htp_target()
    linears = [*checkpoint.block(0).values(), checkpoint.linear("lm_head")]
    inputs = {linear.spec.name: codes_in(linear) for linear in linears}
    found = run_linears(linears, {name: x.numpy() for name, x in inputs.items()}, target, OPTIONS)
    for linear in linears:
        name = linear.spec.name
        kernel, theirs = target.kernel(linear.record.kernel), torch.from_numpy(found[name])
        report = compare_layer(linear, kernel, inputs[name], theirs)
        assert report.passed and report.max_steps <= 1.01, f"{name}: {report.max_steps} steps"
        same = static(linear, inputs[name]) == theirs
        assert float(same.double().mean()) > 0.95, name


@pytest.mark.parametrize("arch", [73, 79, 81])
def test_other_architectures_compute_the_same(checkpoint: QuantizedCheckpoint, arch: int) -> None:
    """From v73 on; a target file for another SoC changes two numbers."""
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra [qnn]")
    linear, options = checkpoint.linear("blocks.1.v_proj"), msgspec.structs.replace(OPTIONS, htp_arch=arch)
    name, x = linear.spec.name, codes_in(linear)
    found = torch.from_numpy(run_linears([linear], {name: x.numpy()}, htp_target(), options)[name])
    assert compare_layer(linear, htp_target().kernel(linear.record.kernel), x, found).passed


def test_sums_of_older_architectures_are_refused(checkpoint: QuantizedCheckpoint) -> None:
    """Theirs are others: with 16 bits off by tens of steps, with 8 bits the same."""
    target = htp_target()
    old = msgspec.structs.replace(target, qnn=msgspec.structs.replace(target.qnn, htp_arch=68))
    if checkpoint.tensors["hidden"].bits == 8:
        pytest.importorskip("onnxruntime_qnn", reason="needs the extra [qnn]")
        qnn.refuse(old, checkpoint.records)
        return
    with pytest.raises(InputError, match=r"qnn\.htp_arch = 68"):
        qnn.refuse(old, checkpoint.records)


def test_a_wrong_code_is_more_than_a_step(checkpoint: QuantizedCheckpoint) -> None:
    linear = checkpoint.linear("blocks.0.down_proj")
    x, kernel = codes_in(linear), htp_target().kernel(linear.record.kernel)
    theirs = static(linear, x)
    assert compare_layer(linear, kernel, x, theirs).exact
    step = linear.record.output.scale
    assert compare_layer(linear, kernel, x, theirs + step).passed
    assert not compare_layer(linear, kernel, x, theirs + 2 * step).passed


def test_rounded_down_is_the_code_below() -> None:
    grid = StaticRange(0.5, 3, 8)
    x = torch.tensor([0.0, 0.49, 0.5, -0.01, -1000.0, 1000.0])
    assert rounded_down(x, grid).tolist() == [0.0, 0.0, 0.5, -0.5, -65.5, 62.0]
