"""The runners in C++, compiled here: the same answers as ONNX Runtime's Python and ExecuTorch's, and plain refusals."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from afq_export.device.build import NATIVE, ONNX, find_compiler
from afq_export.device.host import open_host
from afq_export.device.kit import kit_for, runner_folder, runtime_of
from afq_export.device.program import Program
from afq_export.device.session import Limits, LinearProgram, open_session
from afq_export.errors import MissingToolError, VerdictError
from afq_export.lower.executorch.probe import run_linears
from afq_export.lower.executorch.program import lower_program
from afq_export.progress import silent
from afq_export.runtime.executorch import ExecutorchSession
from afq_export.validate.device_linears import compare_linears
from tests.checkpoints import KERNELS, random_checkpoint, random_linear, random_windows, small_config
from tests.device.decoders import VOCAB, expected, matmul, save_decoder
from tests.device.test_session import FACTS, OPTIONS
from tests.lower.reference import TARGET

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_compiler(NATIVE) is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Runners are built once for this module; headers of ONNX Runtime are those of the machine's own cache."""
    try:
        headers = runtime_of("onnxruntime", NATIVE).headers
    except MissingToolError:
        headers = ()
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("cache")
        patch.setenv("AFQ_CACHE", str(root))
        yield headers


@pytest.fixture(scope="module")
def onnx_runner(cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not cache:
        pytest.skip("needs the headers of libonnxruntime-dev")
    from afq_export.device.build import installed_package, onnxruntime_of

    package = installed_package("onnxruntime")
    assert package
    against = onnxruntime_of(package, cache[0], NATIVE, "1.31")
    folder = runner_folder(ONNX, against)
    for library in against.libraries:
        (folder / "libonnxruntime.so.1").symlink_to(library)
    return folder / ONNX


def test_the_onnx_runner_answers_as_the_script(onnx_runner: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    save_decoder(model)
    ids_NT = torch.from_numpy(np.random.default_rng(1).integers(0, VOCAB, (3, 11)))
    program = Program("onnxruntime", (model,), OPTIONS)
    answers = []
    for runner in (None, onnx_runner):
        with open_session(open_host(), program, Limits(VOCAB, 64, 4), runner=runner) as session:
            ran = session.run(ids_NT, prompt=6, profile=True)
            weight = np.arange(12, dtype=np.float32).reshape(4, 3)
            x = np.ones((2, 4), np.float32)
            linear = LinearProgram(matmul(weight, "a"), {"a": x}, {"a": x @ weight}, {"a": 0.0})
            answers.append((ran, session.linears([linear])))
    (script, products), (compiled, same) = answers
    assert np.array_equal(compiled.logits.numpy(), np.stack([expected(ids_T) for ids_T in ids_NT.numpy()]))
    assert torch.equal(script.logits, compiled.logits) and torch.equal(script.choices, compiled.choices)
    assert torch.allclose(script.losses, compiled.losses, rtol=0, atol=1e-12)
    assert script.operators == compiled.operators and script.version == compiled.version
    assert np.array_equal(products[0]["a"], same[0]["a"])
    assert any("libonnxruntime" in name for name, _, _ in compiled.code)


def test_the_pte_runner_answers_as_the_session(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(), "qd8-f32-qb4w")
    model = tmp_path / "model.pte"
    model.write_bytes(lower_program(checkpoint, TARGET, silent).pte)
    here = ExecutorchSession(model)
    ids_NT = random_windows(checkpoint.config).ids_NT
    linears = [random_linear(kernel, 40, 96, name=f"blocks.0.{kernel}", bias=True) for kernel in KERNELS]
    random = np.random.default_rng(0)
    inputs = {linear.spec.name: random.standard_normal((33, 96), np.float32) for linear in linears}
    kept: list[bytes] = []
    probe = LinearProgram(b"", inputs, run_linears(linears, inputs, kept.append), dict.fromkeys(inputs, 0.0))
    limits = Limits(here.vocab, here.context, here.prefill)
    with open_session(open_host(), Program("executorch", (model,)), limits) as session:
        ran = session.run(ids_NT)
        stepped = session.run(ids_NT, prompt=2)
        given = LinearProgram(kept[0], probe.inputs, probe.outputs, probe.bounds)
        found = compare_linears([given], session.linears([given]))
    want = torch.stack([here.logits(ids_T) for ids_T in ids_NT])
    for one in (ran, stepped):
        assert float((one.logits - want).abs().max() / want.abs().max()) < 0.05  # random weights flip codes
        losses = -one.logits[:, :-1].double().log_softmax(-1).gather(-1, ids_NT[:, 1:, None])[..., 0]
        assert torch.allclose(one.losses, losses, rtol=0, atol=1e-9)
        assert torch.equal(one.choices, one.logits[:, :-1].argmax(-1))
    assert found.exact == found.count == len(linears)
    assert any("xnnpack" in name for name, _, _ in ran.code)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["colour blue"], "not a line of a job: colour blue"),
        (["model"], "not a line of a job: model"),
        (["model x", "ids ids"], "the job has no windows"),
        (["model x", "ids ids", "windows 0"], "windows is a number from 1"),
        (["model x", "ids ids", "windows 1x"], "windows is a number from 1"),
        (["model x", "windows 1", "tokens 2", "prompt 3", "call 1", "ids ids"], "prompt is longer than the window"),
        (["model x", "windows 1", "tokens 3", "prompt 3", "call 1", "ids ids"], "not as many values as said"),
        (["model x", "windows 1", "tokens 2", "prompt 2", "call 1", "ids none"], "not as many values as said"),
        (["matrices none"], "cannot read"),
    ],
)
def test_a_wrong_job_is_refused(onnx_runner: Path, tmp_path: Path, lines: list[str], said: str) -> None:
    """By both runners in C++ (what they share) and, in its own words, by the script."""
    save_decoder(tmp_path / "x")
    np.zeros(2, "<i8").tofile(tmp_path / "ids")
    (tmp_path / "job").write_text("".join(f"{line}\n" for line in lines))
    done = subprocess.run([onnx_runner, tmp_path / "job"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and said in done.stderr and done.stderr.count("\n") == 1


def test_a_broken_program_is_told(tmp_path: Path) -> None:
    model = tmp_path / "model.pte"
    model.write_bytes(b"no program")
    with (
        open_session(open_host(), Program("executorch", (model,)), Limits(8, 8, 8)) as session,
        pytest.raises(VerdictError, match=r"the exported file does not run \[host\]: the program does not load"),
    ):
        session.run(torch.zeros(1, 4, dtype=torch.long))


def test_the_answer_is_json(onnx_runner: Path, tmp_path: Path) -> None:
    save_decoder(tmp_path / "x")
    np.zeros(2, "<i8").tofile(tmp_path / "ids")
    lines = ["model x", "windows 1", "tokens 2", "prompt 1", "call 1", "ids ids", "threads 1", "level all"]
    (tmp_path / "job").write_text("".join(f"{line}\n" for line in lines))
    done = subprocess.run([onnx_runner, tmp_path / "job"], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert set(answer) == {"version", "load", "prefill", "decode", "memory", "code"}
    assert kit_for("executorch", FACTS).files
