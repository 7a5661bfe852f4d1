"""What every validation of a Qualcomm bundle counts besides its linears."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from afq_export.arch.decoder import head
from afq_export.lower.qnn.program import lower_qnn
from afq_export.progress import silent
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.validate.evaluate import hidden_states
from afq_export.validate.htp import htp_rung
from afq_export.validate.qnn import operator_steps, runtime_checks
from afq_export.validate.single_steps import hang_on_steps
from tests.static_checkpoints import htp_target, random_windows, static_checkpoint


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Path]:
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra [qnn]")
    folder = tmp_path_factory.mktemp("bundle")
    checkpoint = static_checkpoint(folder, "w8a16-static+rtn")[1]
    (folder / "bundle").mkdir()
    lower_qnn(checkpoint, htp_target(), folder / "bundle", {}, silent)
    return checkpoint, folder / "bundle"


def test_all_operators_are_within_the_targets_steps(bundle: tuple[QuantizedCheckpoint, Path]) -> None:
    ids = random_windows(1, 16).ids_NT[0]
    checks = {check.name: check for check in runtime_checks(bundle[1], htp_target(), ids)}
    assert {name: check.status for name, check in checks.items()} == {"kernels": "passed", "operators": "passed"}


def test_no_kind_of_operator_is_left_out(bundle: tuple[QuantizedCheckpoint, Path]) -> None:
    found = operator_steps(bundle[1], random_windows(1, 16).ids_NT[0])
    assert {kind: steps.operators for kind, steps in found.items()} == {
        "Add": 10, "MatMul of two tensors": 4, "MatMul with a weight": 15, "Mul": 14, "QuantizeLinear": 4,
        "RMSNormalization": 5, "Sigmoid": 2, "Softmax": 2,
    }  # fmt: skip


def test_more_steps_than_allowed_fail_and_are_named(bundle: tuple[QuantizedCheckpoint, Path]) -> None:
    target = htp_target()
    allowed = {"16": target.qnn.steps(16) | {"Sigmoid": 0}}
    strict = msgspec.structs.replace(target, qnn=msgspec.structs.replace(target.qnn, operator_steps=allowed))
    check = runtime_checks(bundle[1], strict, random_windows(1, 16).ids_NT[0])[1]
    assert check.status == "failed" and check.detail.startswith("Sigmoid is off by")


def test_choices_that_hang_on_steps(bundle: tuple[QuantizedCheckpoint, Path]) -> None:
    """A gap of nothing hangs on steps; that between the likeliest and the least likely token does not."""
    rung, ids = htp_rung(bundle[0], htp_target()), random_windows(1, 16).ids_NT[0]
    logits = head(rung.head(), hidden_states(rung, ids[None]))[0]
    order = logits[-1].argsort(descending=True)
    best, worst = int(order[0]), int(order[-1])
    assert hang_on_steps(rung, ids, [(15, best, best), (15, best, worst)]) == [True, False]
