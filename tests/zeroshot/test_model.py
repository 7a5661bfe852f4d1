"""The adapter gives what lm-eval's own Hugging Face model gives, when both have the same float model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from afq_export.errors import InputError
from afq_export.load.model import open_model
from afq_export.load.tokenizer import open_tokenizer
from afq_export.progress import silent
from afq_export.zeroshot.harness import ask, float_model, tokens
from afq_export.zeroshot.model import SessionLM
from afq_export.zeroshot.sources import open_set
from tests.zeroshot.sample import TEXTS, TorchSession

TASKS = ("arc_easy", "piqa", "hellaswag", "winogrande", "openbookqa", "copa")


@pytest.fixture(scope="module", params=["demo-llama", "demo-opt"])
def pair(request: pytest.FixtureRequest) -> tuple[SessionLM, Any]:
    """Ours and lm-eval's."""
    model = open_model(request.param)
    theirs = float_model(model)
    session = TorchSession(theirs.model, model.config.max_positions)
    return SessionLM(session, open_tokenizer(model)), theirs


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def pairs() -> list[tuple[str, str]]:
    """With an empty context, one that ends in spaces, a single token, and one choice that is what is greedily said."""
    plain = [(text, f" {choice}") for text, choices, _ in TEXTS for choice in choices]
    return [*plain, ("", "The cat sat."), ("The cat  ", "sat down."), ("Once upon a time, there was a little", " girl")]


def test_log_likelihoods(pair: tuple[SessionLM, Any]) -> None:
    ours, theirs = pair
    asked = requests("loglikelihood", pairs())
    found, expected = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert {one[1] for one in found} == {True, False}, "greedy answers are among them"


def test_tokens_are_cut_alike(pair: tuple[SessionLM, Any], folder: Path) -> None:
    ours, theirs = pair
    for name in TASKS:
        given = open_set(name, folder, None)
        assert tokens(ours, given) == tokens(theirs, given) != tokens(ours, open_set(name, folder, 1))


def test_accuracies(pair: tuple[SessionLM, Any], folder: Path) -> None:
    sets = [open_set(name, folder, None) for name in TASKS]
    assert ask(pair[0], sets, silent, "ours") == ask(pair[1], sets, silent, "theirs")


def test_rolling_log_likelihoods(pair: tuple[SessionLM, Any]) -> None:
    """Shorter than the context, and over several windows of it."""
    ours, theirs = pair
    asked = requests("loglikelihood_rolling", [("The cat sat on the mat.",), ("She saw a dog. " * 120,)])
    assert len(ours.tok_encode(asked[1].args[0])) > ours.max_length
    found = ours.loglikelihood_rolling(asked)
    assert found == pytest.approx(theirs.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-6)


@pytest.mark.parametrize("until", [["."], ["the", "\n"], []])
def test_generated_texts(pair: tuple[SessionLM, Any], until: list[str]) -> None:
    ours, theirs = pair
    arguments = {"until": until, "max_gen_toks": 24, "do_sample": False}
    asked = requests("generate_until", [(text, arguments) for text, _, _ in TEXTS])
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert any(found) and not any(stop in text for text in found for stop in until)


def test_random_decoding_is_refused(pair: tuple[SessionLM, Any]) -> None:
    with pytest.raises(InputError, match="random"):
        pair[0].generate_until(requests("generate_until", [("The", {"do_sample": True, "temperature": 0.7})]))


def test_a_shared_beginning_is_computed_once(pair: tuple[SessionLM, Any]) -> None:
    """Three choices of one question: the context once, then its last token and the choice's own."""
    ours = pair[0]
    session, text = ours.session, TEXTS[0][0]
    context = len(ours.tok_encode(text))
    session.calls.clear()
    ours._seen = []
    asked = requests("loglikelihood", [(text, f" {choice}") for choice in TEXTS[0][1]])
    ours.loglikelihood(asked, disable_tqdm=True)
    positions = [position for position, _ in session.calls]
    assert positions[0] == 0 and all(context - 1 <= position < context + 1 for position in positions[1:])
    assert sum(count for _, count in session.calls[1:]) < context + 8


def test_what_is_computed_once_changes_nothing(pair: tuple[SessionLM, Any]) -> None:
    """Against an adapter that has seen nothing before each request, also after a request that failed."""
    ours = pair[0]
    asked = requests("loglikelihood", pairs())
    fresh = [SessionLM(ours.session, ours.tokenizer).loglikelihood([one], disable_tqdm=True)[0][0] for one in asked]
    ours._seen = []
    with pytest.raises(InputError, match="does not fit"):
        ours.loglikelihood(requests("loglikelihood", [("a" * 9000, " b")]), disable_tqdm=True)
    found = [one[0] for one in ours.loglikelihood(asked, disable_tqdm=True)]
    assert found == pytest.approx(fresh, abs=1e-4)


def test_a_long_text_is_refused_or_loses_its_beginning_as_in_lm_eval(pair: tuple[SessionLM, Any]) -> None:
    ours, theirs = pair
    long = requests("loglikelihood", [("The cat sat on the mat. " * 200, " She"), ("The cat", " sat")])
    with pytest.raises(InputError, match=r"does not fit the bundle's context.* \d+ tokens, \d+ fit"):
        ours.loglikelihood(long, disable_tqdm=True)
    cutting = SessionLM(ours.session, ours.tokenizer, truncate=True)
    found, expected = cutting.loglikelihood(long, disable_tqdm=True), theirs.loglikelihood(long, disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)


def test_nothing_to_score_is_refused(pair: tuple[SessionLM, Any]) -> None:
    with pytest.raises(InputError, match="nothing to score"):
        pair[0].loglikelihood(requests("loglikelihood", [("The cat", "")]), disable_tqdm=True)


def test_a_bundle_is_a_model_of_lm_eval(bundle: Path) -> None:
    """As its command line makes one: by name, from text, with arguments that every model gets."""
    given = {"batch_size": 1, "max_batch_size": None, "device": None}
    made = get_model("afq").create_from_arg_string(f"bundle={bundle},max_gen_toks=4,truncate=True", given)
    assert made.max_gen_toks == 4 and made.truncate is True and made.max_length == made.session.context
    (text,) = made.generate_until(requests("generate_until", [("Once upon a time", {"until": []})]))
    assert 0 < len(made.tok_encode(text)) <= 5
