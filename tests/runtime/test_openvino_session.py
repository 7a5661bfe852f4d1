"""The OpenVINO session over a real program, and files that are none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")

from openvino import opset15 as ops  # noqa: E402

from afq_export.errors import InputError, MissingToolError  # noqa: E402
from afq_export.runtime.openvino import OpenvinoSession, RunOptions, compiled, read_model  # noqa: E402
from tests.lower.onnx.decoders import CONTEXT, PREFILL, random_ids  # noqa: E402
from tests.lower.openvino.decoders import Lowered, lowered  # noqa: E402

OPTIONS = RunOptions({"INFERENCE_PRECISION_HINT": "f32"}, "CPU", 40, 8)
VOCAB = 96


@pytest.fixture(scope="module", params=["qwen2, groups", "opt, tied"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lowered(tmp_path_factory.mktemp("session"), request.param)


@pytest.fixture(scope="module")
def session(file: Lowered) -> OpenvinoSession:
    return file.session()


def test_facts_come_from_file_and_options(file: Lowered, session: OpenvinoSession) -> None:
    assert (session.vocab, session.context, session.prefill) == (VOCAB, CONTEXT, PREFILL)
    short = OpenvinoSession(file.path, dataclasses.replace(file.options, context=5))
    assert (short.context, short.prefill) == (5, 5), "no call is longer than the context"


def test_a_sequence_starts_anew(session: OpenvinoSession) -> None:
    ids = random_ids(VOCAB, 20)
    first = session.logits(ids)
    assert first.shape == (20, VOCAB) and first.dtype == torch.float32 and torch.isfinite(first).all()
    session.logits(ids.flip(0))
    assert torch.equal(session.logits(ids), first)


def test_extending_is_the_whole_sequence(session: OpenvinoSession) -> None:
    """In calls that are cut where the prefill is: to the last bit; and going back cuts the cache."""
    ids = random_ids(VOCAB, 3 * PREFILL)
    whole = session.logits(ids)
    session.logits(ids[:PREFILL])
    assert torch.equal(session.extend(ids[PREFILL:], PREFILL), whole[PREFILL:])
    assert torch.equal(session.extend(ids[PREFILL:], PREFILL), whole[PREFILL:]), "going back to a place"


def test_generation_is_greedy_and_stops(session: OpenvinoSession) -> None:
    ids = random_ids(VOCAB, 7)
    generated = session.generate(ids, 6, frozenset())
    assert len(generated) == 6
    session.logits(ids)
    step = [session.extend(torch.tensor([token]), 7 + place)[-1] for place, token in enumerate(generated)]
    assert [int(row.argmax()) for row in step[:-1]] == generated[1:]
    assert session.generate(ids, 6, frozenset(generated[3:4])) == generated[: generated.index(generated[3])]
    assert session.generate(ids, 0, frozenset()) == []
    assert len(session.generate(random_ids(VOCAB, CONTEXT - 2), 100, frozenset())) == 3, "ends with the context"


@pytest.mark.parametrize(
    ("ids", "position", "said"),
    [
        (torch.zeros(CONTEXT + 1, dtype=torch.long), 0, f"longer than the program's context .*{CONTEXT + 1} tokens"),
        (torch.tensor([VOCAB]), 0, "outside the vocabulary"),
        (torch.tensor([1]), 9, "that were not seen: position 9, 2 seen"),
        (torch.zeros(0, dtype=torch.long), 0, "must be one sequence"),
    ],
)
def test_what_does_not_fit_is_refused(session: OpenvinoSession, ids: torch.Tensor, position: int, said: str) -> None:
    session.logits(torch.tensor([1, 2]))
    with pytest.raises(InputError, match=said):
        session.extend(ids, position)


@pytest.mark.parametrize("content", [b"", b"no program", b"<net name='x'"])
def test_files_that_are_no_programs_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.xml").write_bytes(content)
    with pytest.raises(InputError, match=r"not an OpenVINO program|cannot read the program"):
        read_model(tmp_path / "m.xml")
    with pytest.raises(InputError, match="no program"):
        read_model(tmp_path / "none.xml")


def test_another_model_is_refused(tmp_path: Path) -> None:
    x = ops.parameter([1], float)
    openvino.save_model(openvino.Model([ops.relu(x)], [x], "other"), tmp_path / "m.xml")
    with pytest.raises(InputError, match="not a decoder of this package"):
        OpenvinoSession(tmp_path / "m.xml", OPTIONS)
    with pytest.raises(MissingToolError, match="no such device here"):
        compiled(tmp_path / "m.xml", dataclasses.replace(OPTIONS, device="NPU"))
