"""The session over a real file, files that are none, providers that are not there, and the options beside the file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from afq_export.errors import InputError, MissingToolError
from afq_export.runtime import onnxruntime as runtime
from afq_export.runtime.onnxruntime import (
    LEVEL,
    LEVELS,
    OnnxSession,
    RunOptions,
    first_line,
    open_session,
    read_options,
    session_options,
    write_options,
)
from tests.lower.onnx.decoders import CONTEXT, PREFILL, Lowered, decoder_config, lowered, random_ids, small_target

VOCAB = 96
NO_IDS = torch.zeros(0, dtype=torch.long)


@pytest.fixture(scope="module", params=["llama", "opt"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lowered(tmp_path_factory.mktemp("session"), decoder_config(request.param, layers=1), "w4a8-g32")


def test_facts_come_from_file_and_options(file: Lowered) -> None:
    session = file.session()
    assert (session.vocab, session.context, session.prefill) == (VOCAB, CONTEXT, PREFILL)
    short = OnnxSession(file.path, dataclasses.replace(file.options, context=5))
    assert (short.context, short.prefill) == (5, 5), "no call is longer than the context"


def test_rows_are_float32_for_every_token(file: Lowered) -> None:
    rows = file.session().logits(random_ids(VOCAB, 11))
    assert rows.shape == (11, VOCAB) and rows.dtype == torch.float32
    assert torch.isfinite(rows).all()


def test_a_sequence_starts_anew(file: Lowered) -> None:
    session, ids = file.session(), random_ids(VOCAB, 20)
    first = session.logits(ids)
    session.logits(ids.flip(0))
    assert torch.equal(session.logits(ids), first)


def test_extending_is_the_whole_sequence(file: Lowered) -> None:
    """In calls that are cut where the prefill is: to the last bit."""
    session, ids = file.session(), random_ids(VOCAB, 3 * PREFILL)
    whole = session.logits(ids)
    session.logits(ids[:PREFILL])
    assert torch.equal(session.extend(ids[PREFILL:], PREFILL), whole[PREFILL:])
    assert torch.equal(session.extend(ids[PREFILL:], PREFILL), whole[PREFILL:]), "going back to a place"


def test_int32_ids_are_taken(file: Lowered) -> None:
    ids = random_ids(VOCAB, 6)
    assert torch.equal(file.session().logits(ids.int()), file.session().logits(ids))


def test_generation_is_greedy_and_stops(file: Lowered) -> None:
    session, ids = file.session(), random_ids(VOCAB, 7)
    generated = session.generate(ids, 6, frozenset())
    assert len(generated) == 6
    session.logits(ids)
    step = [session.extend(torch.tensor([token]), 7 + place)[-1] for place, token in enumerate(generated)]
    assert [int(row.argmax()) for row in step[:-1]] == generated[1:]
    stop = frozenset(generated[3:4])
    assert session.generate(ids, 6, stop) == generated[: generated.index(generated[3])]
    assert session.generate(ids, 0, frozenset()) == []


def test_generation_ends_with_the_context(file: Lowered) -> None:
    ids = random_ids(VOCAB, CONTEXT - 2)
    assert len(file.session().generate(ids, 100, frozenset())) == 3


@pytest.mark.parametrize(
    ("ids", "position", "said"),
    [
        (torch.zeros(CONTEXT + 1, dtype=torch.long), 0, f"longer than the program's context .*{CONTEXT + 1} tokens"),
        (torch.zeros(2, dtype=torch.long), CONTEXT - 1, "longer than the program's context"),
        (torch.tensor([1]), -1, "longer than the program's context"),
        (torch.tensor([VOCAB]), 0, f"outside the vocabulary: ids {VOCAB}..{VOCAB}, vocabulary {VOCAB}"),
        (torch.tensor([3, -1]), 0, "outside the vocabulary: ids -1..3"),
        (torch.tensor([1]), 1, "that were not seen: position 1, 0 seen"),
        (NO_IDS, 0, "must be one sequence"),
        (torch.zeros(1, 4, dtype=torch.long), 0, r"one sequence: shape \(1, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(file: Lowered, ids: torch.Tensor, position: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        file.session().extend(ids, position)


def test_a_refused_call_changes_nothing(file: Lowered) -> None:
    session, ids = file.session(), random_ids(VOCAB, 6)
    session.logits(ids[:4])
    with pytest.raises(InputError, match="outside the vocabulary"):
        session.extend(torch.tensor([VOCAB]), 4)
    with pytest.raises(InputError, match="not seen"):
        session.extend(ids[:1], 5)
    after = session.extend(ids[4:], 4)
    session.logits(ids[:4])
    assert torch.equal(session.extend(ids[4:], 4), after)


def test_both_sides_of_a_call_by_name(file: Lowered) -> None:
    ids = random_ids(VOCAB, 5)
    inputs, outputs = file.session().run_both(ids)
    assert inputs["input_ids"].tolist() == [ids.tolist()]
    assert list(outputs) == ["logits", "present.0.key", "present.0.value"]
    assert torch.equal(torch.from_numpy(outputs["logits"][0]), file.session().logits(ids))
    assert ("position_ids" in inputs) == (file.config.rope is not None)


# Files


@pytest.mark.parametrize("keep", [0, 20, 3000, -1])
def test_a_truncated_file_is_an_input_error(file: Lowered, keep: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(file.path.read_bytes()[:keep])
    with pytest.raises(InputError):
        OnnxSession(path, file.options)


def test_other_files_are_input_errors(file: Lowered, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no program \[.*nothing\.onnx\]"):
        OnnxSession(tmp_path / "nothing.onnx", file.options)
    with pytest.raises(InputError, match="no program"):
        OnnxSession(tmp_path, file.options)
    for number, data in enumerate((b"a text\n" * 300, b"\xee" * 5000)):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(data)
        with pytest.raises(InputError, match="cannot load the program"):
            OnnxSession(path, file.options)


def test_missing_external_data_is_an_input_error(tmp_path: Path) -> None:
    apart = lowered(tmp_path, decoder_config(layers=1), "w8a8-dynamic", small_target(external_data_mb=0))
    data, whole = tmp_path / "model.onnx.data", (tmp_path / "model.onnx.data").read_bytes()
    assert apart.session().logits(random_ids(VOCAB, 3)).shape == (3, VOCAB)
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot load the program"):
        apart.session()
    data.unlink()
    with pytest.raises(InputError, match=r"cannot load the program \[.*model\.onnx\]"):
        apart.session()


def test_another_model_is_not_a_decoder(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match="not a decoder of this package"):
        OnnxSession(tmp_path / "other.onnx", RunOptions({}))
    assert open_session(model.SerializeToString(), RunOptions({})).run(None, {"x": torch.ones(2).numpy()})


def test_a_model_for_a_later_runtime_is_an_input_error(file: Lowered, tmp_path: Path) -> None:
    """What a runtime too old says to a file of a newer opset or IR."""
    for field, value in (("ir_version", 99), ("opset", 99)):
        model = onnx.load(file.path)
        if field == "opset":
            model.opset_import[0].version = value
        else:
            model.ir_version = value
        onnx.save(model, tmp_path / f"{field}.onnx")
        with pytest.raises(InputError, match="cannot load the program"):
            OnnxSession(tmp_path / f"{field}.onnx", file.options)


# Providers and options


@pytest.mark.parametrize("provider", ["XnnpackExecutionProvider", "NnapiExecutionProvider", "CPU"])
def test_a_provider_that_is_missing_is_no_silent_cpu_run(file: Lowered, provider: str) -> None:
    asked = dataclasses.replace(file.options, providers=(provider, "CPUExecutionProvider"))
    with pytest.raises(MissingToolError, match=rf"an execution provider is missing \[{provider}\]: .*CPUExecution"):
        OnnxSession(file.path, asked)


def test_a_provider_that_is_there_and_does_not_start_is_named(file: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lists it, warns, and runs on the CPU."""
    monkeypatch.setattr(runtime, "refuse_missing_providers", lambda providers: None)
    asked = dataclasses.replace(file.options, providers=("CUDAExecutionProvider",))
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(MissingToolError, match="fell back"):
        OnnxSession(file.path, asked)


@pytest.mark.parametrize("level", ["fast", "", "ALL", "ORT_ENABLE_ALL"])
def test_an_unknown_level_is_refused(file: Lowered, level: str) -> None:
    asked = dataclasses.replace(file.options, session={LEVEL: level})
    with pytest.raises(InputError, match=r"no such optimisation level.*disable, basic, extended, all"):
        OnnxSession(file.path, asked)


def test_options_reach_the_runtime() -> None:
    for level, name in LEVELS.items():
        made = session_options({LEVEL: level, "session.x64quantprecision": "1"})
        assert made.graph_optimization_level == getattr(onnxruntime.GraphOptimizationLevel, name)
        assert made.get_session_config_entry("session.x64quantprecision") == "1"
        assert made.intra_op_num_threads == torch.get_num_threads()
    with pytest.raises(InputError, match="cannot load the program"):
        open_session(b"", RunOptions({"": "an entry without a name"}))


def test_without_onnx_runtime_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match=r"ONNX Runtime is not installed.*pip install"):
        runtime.require_onnxruntime()


WORDS = st.text("abcdefgh._019", min_size=1, max_size=12)
OPTIONS = st.builds(
    RunOptions,
    session=st.builds(
        lambda level, entries: {LEVEL: level} | entries,
        st.sampled_from(sorted(LEVELS)),
        st.dictionaries(WORDS.filter(lambda key: key != LEVEL), st.text(max_size=8), max_size=4),
    ),
    providers=st.lists(WORDS, min_size=1, max_size=3).map(tuple),
    context=st.integers(1, 1 << 20),
    prefill=st.integers(1, 1 << 20),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=OPTIONS)
def test_options_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, options: RunOptions) -> None:
    path = tmp_path_factory.getbasetemp() / "session_options.json"
    write_options(path, options)
    assert read_options(path) == options


GOOD = {LEVEL: "all", "config": {}, "providers": ["CPUExecutionProvider"], "context_length": 8, "prefill_length": 4}
BROKEN: dict[str, object] = {
    "no object": [],
    "no level": {key: value for key, value in GOOD.items() if key != LEVEL},
    "no providers": {key: value for key, value in GOOD.items() if key != "providers"},
    "providers that are no list": GOOD | {"providers": 3},
    "providers in one word": GOOD | {"providers": "CPUExecutionProvider"},
    "no provider": GOOD | {"providers": []},
    "a list of entries": GOOD | {"config": []},
    "a context in words": GOOD | {"context_length": "long"},
    "no context": GOOD | {"context_length": None},
    "a key that nobody knows": GOOD | {"thread": 1},
    "an entry that is no text": GOOD | {"config": {"session.x64quantprecision": 1}},
    "an empty context": GOOD | {"context_length": 0},
    "an empty prefill": GOOD | {"prefill_length": -1},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_options_that_do_not_fit_are_input_errors(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "session_options.json"
    path.write_text(json.dumps(GOOD))
    assert read_options(path).context == 8
    path.write_text(json.dumps(BROKEN[fault]))
    with pytest.raises(InputError, match=r"the session options do not fit \[.*session_options\.json\]"):
        read_options(path)


def test_options_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no session options"):
        read_options(tmp_path / "nothing.json")
    for data in (b"", b"{", b"\xff\xfe"):
        (tmp_path / "session_options.json").write_bytes(data)
        with pytest.raises(InputError, match="do not fit"):
            read_options(tmp_path / "session_options.json")


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
