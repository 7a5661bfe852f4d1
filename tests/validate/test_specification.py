"""The standard's meaning of our patterns: numpy's and ONNX Runtime's unfused kernels agree, and with the models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from afq_export.errors import InputError
from afq_export.validate.integer.linear import integer_linear
from afq_export.validate.specification import UNFUSED, Specified, relative_error, specified
from tests.validate.onnx_programs import Program, linear_of

pytest.importorskip("onnxruntime", reason="the runtime is not installed")

CASES = [
    ("static_to_float", 8),
    ("static_requantized", 8),
    ("dynamic_per_token", 8),
    ("weight_only", 8),
    ("weight_only", 4),
    ("weight_only", 2),
]


def described(arithmetic: str, bits: int, bias: bool) -> tuple[Specified, np.ndarray]:
    """Both implementations' outputs and the integer model's, on one input."""
    linear = linear_of(arithmetic, 24, 172, bits=bits, bias=bias)
    x = torch.randn(5, 172, generator=torch.Generator().manual_seed(0))
    program = Program([linear])
    return specified(program.model(), program.feeds([x])), integer_linear(
        f"onnxruntime.{arithmetic}", linear, x
    ).numpy()[None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("arithmetic, bits", CASES)
def test_file_runtime_and_model_mean_the_same(arithmetic, bits, bias):
    found, model = described(arithmetic, bits, bias)
    [reference], [unfused] = found.reference.values(), found.unfused.values()
    if arithmetic == "dynamic_per_token":  # integers and elementwise operators only: nothing is left to choose
        assert (reference == unfused).all() and (reference == model).all()
    else:
        assert found.error() < 1e-6
        assert relative_error(model, reference) < 1e-6


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_level_4_is_not_what_the_file_says(bits):
    """The two implementations agree on the file; the level-4 model differs by its 8-bit activations."""
    found, model = described("dynamic_per_block", bits, True)
    [reference] = found.reference.values()
    assert found.error() < 1e-6
    assert 1e-3 < relative_error(model, reference) < 2e-2


@pytest.mark.parametrize("arithmetic", ["static_to_float", "dynamic_per_block"])
def test_nothing_is_fused(tmp_path, arithmetic):
    program = Program([linear_of(arithmetic)])
    ran = program.operators([torch.ones(1, 64)], tmp_path, UNFUSED)
    assert ran["blocks.0.q_proj"] == "MatMul"
    assert not {"MatMulIntegerToFloat", "QLinearMatMul", "MatMulNBits"} & set(ran.values())


def test_relative_error_of_odd_arrays():
    one = np.ones((1, 2), np.float32)
    assert relative_error(one * 3, one * 2) == 0.5
    assert relative_error(one[:, :1], one) == float("inf")
    assert np.isnan(relative_error(one * np.nan, one))
    assert relative_error(one[:0], one[:0]) == 0


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError, match="specification"):
        specified(b"not a model", {})


def test_a_missing_input_is_refused():
    with pytest.raises(InputError, match="specification"):
        specified(Program([linear_of("static_to_float")]).model(), {})
