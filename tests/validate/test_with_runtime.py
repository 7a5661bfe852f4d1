"""The whole ladder on the real lowering and the real runtime: tiny random models of both families, every kernel."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

from afq_export.progress import silent
from afq_export.validate.ladder import Runtime, validate
from tests.checkpoints import KERNELS, KINDS, random_checkpoint, random_windows, small_config, xnnpack_target
from tests.validate.test_ladder import subject_of
from tests.validate.test_xnnpack_runtime import runs_avx512_vnni

pytest.importorskip("executorch", reason="the runtime is not installed")

FAST = (("llama", "qd8-f32-qb4w"), ("opt", "qs8-qc8w"))
CASES = [
    pytest.param(kind, kernel, marks=() if (kind, kernel) in FAST else pytest.mark.slow)
    for kind in KINDS
    for kernel in KERNELS
]


@pytest.mark.filterwarnings("ignore")  # torch's and ExecuTorch's own deprecations
@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_the_exported_file_is_the_integer_reference(tmp_path, kind, kernel):
    from afq_export.lower.executorch.float_parts import ExecutorchFloatParts
    from afq_export.lower.executorch.probe import run_linears
    from afq_export.lower.executorch.program import lower_program
    from afq_export.runtime.executorch import ExecutorchSession

    checkpoint, target = random_checkpoint(tmp_path / "quantized", small_config(kind), kernel), xnnpack_target()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowered = lower_program(checkpoint, target, silent)
        (tmp_path / "model.pte").write_bytes(lowered.pte)
        windows = random_windows(checkpoint.config, count=4, length=48)
        subject = dataclasses.replace(subject_of(checkpoint), target=target, windows=windows, coverage=lowered.coverage)
        runtime = Runtime(
            lambda: ExecutorchSession(tmp_path / "model.pte"),
            run_linears,
            lambda session: ExecutorchFloatParts(session.context, session.prefill),
        )
        report = validate(subject, runtime)
    assert report.verdict == "pass", [check for check in report.checks if check.status != "passed"]
    assert report.agreement.float_operators == "executorch"
    if kernel != "qd8-f32-qb4w" or runs_avx512_vnni():
        assert report.agreement.bit_for_bit == 1
    assert all(layer.passed for layer in report.layers)
    assert all(layer.exact for layer in report.layers if not target.kernel(layer.kernel).max_relative_error)
    assert [lowered.name for lowered in report.coverage.lowered] == list(checkpoint.records)
