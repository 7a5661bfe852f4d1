"""The session over a real program, and files that are none."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from afq_export.errors import InputError, MissingToolError
from afq_export.lower.executorch.program import lower_program
from afq_export.progress import silent
from afq_export.runtime import library
from afq_export.runtime.executorch import ExecutorchSession
from afq_export.spec.target import Shapes
from tests.checkpoints import random_checkpoint, small_config
from tests.lower.reference import TARGET, random_ids


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    checkpoint = random_checkpoint(folder / "quantized", small_config(layers=1), "qd8-f32-qb4w")
    target = msgspec.structs.replace(TARGET, shapes=Shapes(context=24, prefill=4))
    path = folder / "model.pte"
    path.write_bytes(lower_program(checkpoint, target, silent).pte)
    return path


def test_facts_come_from_the_program(program: Path) -> None:
    session = ExecutorchSession(program)
    assert (session.vocab, session.context, session.prefill) == (96, 24, 4)


def test_generation_is_greedy_and_stops(program: Path) -> None:
    session, ids = ExecutorchSession(program), random_ids(96, 7)
    generated = session.generate(ids, 6, frozenset())
    assert len(generated) == 6
    rows = session.logits(torch.cat((ids, torch.tensor(generated))))[6:-1]
    assert rows.argmax(-1).tolist() == generated
    assert session.generate(ids, 6, frozenset(generated[3:4])) == generated[: generated.index(generated[3])]


def test_generation_ends_with_the_context(program: Path) -> None:
    session, ids = ExecutorchSession(program), random_ids(96, 22)
    assert len(session.generate(ids, 100, frozenset())) == 24 - 22 + 1


@pytest.mark.parametrize(
    ("ids", "position"),
    [(torch.zeros(25, dtype=torch.long), 0), (torch.zeros(2, dtype=torch.long), 23), (torch.tensor([96]), 0)],
    ids=["too long", "past the end", "no such token"],
)
def test_what_does_not_fit_is_refused(program: Path, ids: torch.Tensor, position: int) -> None:
    with pytest.raises(InputError):
        ExecutorchSession(program).extend(ids, position)


def test_empty_sequences_are_refused(program: Path) -> None:
    with pytest.raises(InputError, match="one sequence"):
        ExecutorchSession(program).logits(torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("keep", [0, 20, 3000, -1])
def test_a_truncated_file_is_an_input_error(program: Path, keep: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(program.read_bytes()[:keep])
    with pytest.raises(InputError):
        ExecutorchSession(path)


def test_other_files_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no program"):
        ExecutorchSession(tmp_path / "nothing.pte")
    path = tmp_path / "noise.pte"
    path.write_bytes(b"\xee" * 5000)
    with pytest.raises(InputError, match="not an ExecuTorch program"):
        ExecutorchSession(path)


def test_without_executorch_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match="pip install"):
        library.require_executorch()
