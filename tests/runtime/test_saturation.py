"""The detector of saturating kernels: silent where none is, and loud where one is simulated or emulated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from afq_export.runtime.saturation import PATTERNS, saturating, worst_case

pytest.importorskip("onnxruntime", reason="the runtime is not installed")

REMEDY = {"session.x64quantprecision": "1"}
QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
INTEGER = {"static_to_float", "static_requantized", "dynamic_per_token"}


@pytest.mark.parametrize("level", ["0", "4"])
def test_with_the_remedy_every_machine_is_right(level):
    assert saturating(REMEDY | {"session.qdq_matmulnbits_accuracy_level": level}) == {}


def kernel(saturates: bool):
    """A stand-in for the runtime: uint8 by int8, pairs of products added in int16, with or without its limits."""

    def run(model: bytes, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(model).graph.initializer}
        weights = tensors["static_to_float.codes"].astype(np.int64)
        codes = np.rint(inputs["x"] * 127).astype(np.int64) + 128
        products = codes[..., None] * weights
        pairs = products[..., ::2, :] + products[..., 1::2, :]
        if saturates:
            pairs = pairs.clip(-(2**15), 2**15 - 1)
        y = (pairs.sum(-2) - 128 * weights.sum(0)) * tensors["unit"] * tensors["scales"]
        step = tensors["output_step"]
        found = {"static_to_float": y, "dynamic_per_token": y, "static_requantized": (y / step).round() * step}
        case = worst_case()
        rows = [int(np.flatnonzero((case.x[0] == row).all(-1))[0]) for row in inputs["x"][0]]
        return found | {name: case.expected[name][:, rows] for name in PATTERNS if name not in found}

    return run


def test_a_saturating_kernel_is_detected():
    wrong = saturating({}, kernel(saturates=True))
    assert set(wrong) == INTEGER
    assert all(error > 0.9 for error in wrong.values())


def test_the_same_kernel_without_the_limit_is_right():
    assert saturating({}, kernel(saturates=False)) == {}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_wrong_number_of_one_pattern_is_detected(pattern):
    right = kernel(saturates=False)

    def run(model: bytes, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = {name: array.copy() for name, array in right(model, inputs).items()}
        found[pattern][0, -1, -1] = np.nan
        return found

    assert set(saturating({}, run)) == {pattern}


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64 for user programs")
def test_an_emulated_cpu_without_vnni_is_detected_and_cured():
    """QEMU's Haswell: AVX2, no VNNI."""
    code = (
        "import json; from afq_export.runtime.saturation import saturating; "
        f"print(json.dumps([saturating({{}}), saturating({REMEDY!r})]))"
    )
    command = [str(QEMU), "-cpu", "Haswell", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plain, cured = json.loads(done.stdout.splitlines()[-1])
    assert set(plain) == INTEGER and all(error > 0.9 for error in plain.values())
    assert cured == {}
