"""Real ARM kernels, where the emulation is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from afq_export.device.arm64.device import Arm64Device, open_arm64
from afq_export.device.arm64.environment import SET_UP, Environment, open_environment
from afq_export.device.arm64.processors import PROCESSORS
from afq_export.device.build import AARCH64
from afq_export.device.kit import kit_for
from afq_export.device.program import Program
from afq_export.device.session import Limits, LinearProgram, open_session
from afq_export.errors import MissingToolError, VerdictError
from afq_export.lower.executorch.probe import run_linears
from afq_export.lower.executorch.program import lower_program
from afq_export.lower.onnx.probe import run_linears as run_onnx_linears
from afq_export.progress import silent
from afq_export.runtime.executorch import ExecutorchSession
from afq_export.runtime.onnxruntime import RunOptions
from afq_export.validate.device_linears import compare_linears, record_linears
from tests.checkpoints import KERNELS, random_checkpoint, random_linear, random_windows, small_config
from tests.device.decoders import VOCAB, expected, save_decoder
from tests.lower.onnx.decoders import decoder_config, lowered, random_ids, small_target
from tests.lower.reference import TARGET

FAMILIES = {"cortex-a53": "neon", "cortex-a55": "dotprod", "cortex-a76": "dotprod", "cortex-a710": "i8mm"}


def installed() -> Environment | None:
    try:
        return open_environment(check=False)
    except MissingToolError:
        return None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(installed() is None, reason=f"the arm64 emulation is not installed: {SET_UP}"),
]


def executorch(folder: Path) -> Program:
    return Program("executorch", (folder / "model.pte",))


@pytest.fixture(scope="module")
def environment() -> Environment:
    return open_environment()


def test_every_known_processor_is_in_this_qemu(environment: Environment) -> None:
    assert set(PROCESSORS) == set(environment.installed.processors)


@pytest.mark.parametrize("cpu", FAMILIES)
def test_linears_of_xnnpack_compute_the_same_integers(environment: Environment, tmp_path: Path, cpu: str) -> None:
    """Static results are codes: equal. Dynamic ones differ by the rounding of a fused multiplication at most."""
    linears = [random_linear(kernel, 40, 96, name=f"blocks.0.{kernel}", bias=True) for kernel in KERNELS]
    random = np.random.default_rng(0)
    inputs = {linear.spec.name: random.standard_normal((33, 96), np.float32) for linear in linears}
    kept: list[bytes] = []
    outputs = run_linears(linears, inputs, kept.append)
    program = LinearProgram(kept[0], inputs, outputs, dict.fromkeys(inputs, 0.0))
    (tmp_path / "model.pte").write_bytes(kept[0])
    with open_session(Arm64Device(environment, cpu), executorch(tmp_path), Limits(1, 1, 1)) as session:
        (there,) = session.linears([program])
    assert compare_linears([program], [there]).beyond == {}
    static = [linear.spec.name for linear in linears if linear.record.output is not None]
    assert static and all(np.array_equal(outputs[name], there[name]) for name in static)


@pytest.mark.parametrize("cpu", FAMILIES)
def test_a_program_runs_and_says_which_kernels_ran(environment: Environment, tmp_path: Path, cpu: str) -> None:
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(), "qd8-f32-qb4w")
    model = tmp_path / "model.pte"
    model.write_bytes(lower_program(checkpoint, TARGET, silent).pte)
    here = ExecutorchSession(model)
    limits = Limits(here.vocab, here.context, here.prefill)
    ids_NT = random_windows(checkpoint.config).ids_NT
    want = torch.stack([here.logits(ids_T) for ids_T in ids_NT])
    with open_session(Arm64Device(environment, cpu), executorch(tmp_path), limits) as there:
        found = there.run(ids_NT).logits
        assert float((found - want).abs().max() / want.abs().max()) < 0.05  # random weights flip codes
        assert torch.equal(found, there.run(ids_NT).logits)
        assert there.kernels(ids_NT[0, :9]).family == FAMILIES[cpu]


def test_onnx_runtime_computes_what_is_expected(environment: Environment, tmp_path: Path) -> None:
    save_decoder(tmp_path / "model.onnx")
    ids_NT = np.random.default_rng(3).integers(0, VOCAB, (2, 9))
    program = Program("onnxruntime", (tmp_path / "model.onnx",), RunOptions({}))
    device = open_arm64("cortex-a53")
    facts = msgspec.structs.replace(device.facts(), python="")
    files = kit_for("onnxruntime", facts).files  # for a device without Python
    for path, name in files:
        shutil.copy(path, tmp_path / name)
    for runner in (None, tmp_path / "onnx_runner"):
        with open_session(device, program, Limits(VOCAB, 64, 4), runner=runner) as session:
            found = session.run(torch.from_numpy(ids_NT), prompt=6).logits.numpy()
        assert np.array_equal(found, np.stack([expected(ids_T) for ids_T in ids_NT]))


def test_what_a_processor_says_of_itself(environment: Environment) -> None:
    facts = Arm64Device(environment, "cortex-a53").facts()
    assert (facts.abi, facts.os, facts.kind, facts.emulated) == (AARCH64, "linux", "arm64", True)
    assert "asimd" in facts.cpu_features and "asimddp" not in facts.cpu_features
    assert "asimddp" in Arm64Device(environment, "cortex-a76").facts().cpu_features


def test_a_broken_program_does_not_run(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(b"no program")
    with (
        open_session(Arm64Device(environment, "cortex-a76"), executorch(tmp_path), Limits(8, 8, 8)) as session,
        pytest.raises(VerdictError, match=r"the exported file does not run \[arm64:cortex-a76\]"),
    ):
        session.run(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("target", "scheme", "cpu", "beyond"),
    [
        ("linux-arm64-ort", "w8a8-static", "cortex-a53", False),
        ("linux-arm64-ort", "w8a8-dynamic", "cortex-a76", False),
        ("linux-arm64-ort", "w4a8-g32", "cortex-a55", False),
        ("linux-arm64-ort", "w4a8-g32", "cortex-a53", True),
        ("linux-x64-ort", "w4a8-g32", "cortex-a55", True),
    ],
)
def test_linears_of_onnx_runtime(
    environment: Environment, tmp_path: Path, target: str, scheme: str, cpu: str, beyond: bool
) -> None:
    """8-bit weights: equal. MatMulNBits at level 4: within its bound with dot product and written zero points, which
    the x86 target leaves out; a float kernel without dot product."""
    case = lowered(tmp_path, decoder_config(), scheme, small_target(target))

    def probe(linears, inputs, **keep):
        return run_onnx_linears(linears, inputs, case.target, case.options, **keep)

    programs = record_linears(case.checkpoint, case.target, random_ids(case.config.vocab, 33), probe, silent)
    model = Program("onnxruntime", (case.path,), case.options)
    with open_session(Arm64Device(environment, cpu), model, Limits(case.config.vocab, 64, 64)) as session:
        found = compare_linears(programs, session.linears(programs))
    assert bool(found.beyond) is beyond
    if scheme != "w4a8-g32":
        assert found.exact == found.count
