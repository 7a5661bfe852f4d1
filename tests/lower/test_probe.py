"""Single linears through the runtime, and test vectors in a bundled program."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from afq_export.errors import InputError
from afq_export.lower.executorch.bundled import bundled_program
from afq_export.lower.executorch.probe import run_linears
from afq_export.lower.executorch.program import lower_program
from afq_export.progress import silent
from afq_export.runtime.library import load_runtime
from afq_export.validate.integer.linear import integer_linear
from tests.checkpoints import KERNELS, random_checkpoint, random_linear, small_config
from tests.lower.reference import ARITHMETICS, TARGET


@pytest.mark.parametrize("tokens", [1, 33])
def test_kernels_give_what_the_integer_models_say(tokens: int) -> None:
    linears = [
        random_linear(kernel, 40, 96, name=f"blocks.0.{kernel}{bias}", bias=bias)
        for kernel in KERNELS
        for bias in (False, True)
    ]
    random = np.random.default_rng(0)
    inputs = {linear.spec.name: random.standard_normal((tokens, 96), np.float32) for linear in linears}
    results = run_linears(linears, inputs)
    for linear in linears:
        name, kernel = linear.spec.name, linear.record.kernel
        expected = integer_linear(ARITHMETICS[kernel], linear, torch.from_numpy(inputs[name])).numpy()
        bound = TARGET.kernel(kernel).max_relative_error * np.abs(expected).max()
        assert np.abs(results[name] - expected).max() <= bound, name


def test_an_input_must_be_there_and_fit() -> None:
    linear = random_linear("qd8-f32-qc8w", 8, 32, name="lm_head", bias=False)
    with pytest.raises(InputError, match="no input"):
        run_linears([linear], {})
    with pytest.raises(InputError, match="does not fit"):
        run_linears([linear], {"lm_head": np.zeros((2, 31), np.float32)})


def test_bundled_program_runs_its_own_cases(tmp_path) -> None:
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(layers=1), "qd8-f32-qb4w")
    pte = lower_program(checkpoint, TARGET, silent).pte
    inputs = [torch.arange(6)[None], torch.tensor([0])]
    runtime = load_runtime()
    logits = runtime._load_for_executorch_from_buffer(pte).forward(inputs)[0]
    bundle = bundled_program(pte, [(inputs, [logits]), (inputs, [logits + 1])])
    module = runtime._load_bundled_program_from_buffer(bundle)
    module.verify_result_with_bundled_expected_output("forward", 0, 1e-5, 1e-6)
    with pytest.raises(RuntimeError):
        module.verify_result_with_bundled_expected_output("forward", 1, 1e-5, 1e-6)
