"""onnxruntime-genai generates from the bundle what the bundle's own session generates, by the same arithmetic."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afq_export.errors import InputError
from afq_export.generate import generate
from afq_export.load.config import read_config
from afq_export.load.tokenizer import load_folder_tokenizer
from afq_export.lower.bundle import Bundle
from afq_export.lower.onnx.genai import GENAI_CONFIG, genai_config, session_options
from afq_export.spec.recipe import KvCache
from tests.checkpoints import small_config

LEVEL = "session.qdq_matmulnbits_accuracy_level"
PROMPT, TOKENS = "Once upon a time there was a little dog", 24
needs_genai = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None,
    reason='onnxruntime-genai is not installed: pip install "onnxruntime-genai==0.18.*"',
)
MODELS = {name: os.environ.get(f"AFQ_TEST_{name}", "") for name in ("STORIES260K", "SMOLLM2")}
"""Models that the project does not hold: folders or files that the environment names."""


def written(kind: str = "llama", session: dict[str, str] | None = None, **changes: Any) -> dict:
    """The parsed file for a small model."""
    return json.loads(genai_config(small_config(kind, **changes), 48, session or {}))


# What is in the file


def test_the_size_of_a_head_is_that_of_the_caches_rows() -> None:
    """GenAI makes caches of that size in the type of the graph's input: bytes of codes and their grid."""
    text = genai_config(small_config(), 48, {}, KvCache(8))
    assert json.loads(text)["model"]["decoder"]["head_size"] == 32 + 8


def test_names_and_sizes_are_the_graphs() -> None:
    model = written()["model"]
    decoder = model["decoder"]
    assert (model["vocab_size"], model["context_length"]) == (96, 48)
    sizes = ("hidden_size", "head_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    assert [decoder[size] for size in sizes] == [64, 32, 4, 2, 2]
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert decoder["outputs"] == {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }


def test_caches_grow_and_search_is_greedy() -> None:
    search = written()["search"]
    assert search["past_present_share_buffer"] is False
    assert (search["do_sample"], search["num_beams"], search["max_length"]) == (False, 1, 48)


@pytest.mark.parametrize(
    ("kind", "expected"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("opt", "decoder")]
)
def test_a_family_without_a_name_in_genai_is_a_decoder(kind: str, expected: str) -> None:
    model = written(kind)["model"]
    assert model["type"] == expected
    assert ("position_ids" in model["decoder"]["inputs"]) == (kind != "opt")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((2,), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}),
        ((7, 2), {"bos_token_id": 1, "eos_token_id": [7, 2], "pad_token_id": 7}),
        ((), {"bos_token_id": 1}),
    ],
)
def test_special_tokens(ends: tuple[int, ...], expected: dict) -> None:
    model = written(eos_ids=ends)["model"]
    assert {key: value for key, value in model.items() if key.endswith("token_id")} == expected
    assert "bos_token_id" not in written(bos_id=None)["model"]


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("disable", "ORT_DISABLE_ALL"),
        ("basic", "ORT_ENABLE_BASIC"),
        ("ORT_ENABLE_EXTENDED", "ORT_ENABLE_EXTENDED"),
        ("all", "ORT_ENABLE_ALL"),
    ],
)
def test_session_options_stand_in_genais_words(level: str, expected: str) -> None:
    given = {"graph_optimization_level": level, LEVEL: "4", "session.x64quantprecision": 1, "intra_op_num_threads": 2}
    assert session_options(given) == {
        "graph_optimization_level": expected,
        LEVEL: "4",
        "session.x64quantprecision": "1",
        "intra_op_num_threads": 2,
    }
    assert written(session=given)["model"]["decoder"]["session_options"].items() >= session_options(given).items()


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"graph_optimization_level": "layout"}, "GenAI knows disable_all, enable_basic"),
        ({"intra_op_num_threads": "two"}, "whole number"),
        ({"intra_op_num_threads": -1}, "whole number"),
        ({"accuracy_level": "4"}, "neither an option"),
        ({"provider_options": "cuda"}, "neither an option"),
    ],
)
def test_an_option_that_would_be_lost_is_refused(option: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        session_options(option)


@pytest.mark.parametrize("context", [0, 65])
def test_a_context_that_the_model_has_not_is_refused(context: int) -> None:
    with pytest.raises(InputError, match="context does not fit"):
        genai_config(small_config(), context, {})


# What GenAI does with it


class GenAI:
    """A folder opened by onnxruntime-genai; `ids` is the prompt with the tokens that the tokenizer adds."""

    def __init__(self, folder: Path, prompt: str = PROMPT) -> None:
        import onnxruntime_genai as genai

        self._genai, self._model = genai, genai.Model(str(folder))
        self._tokenizer = genai.Tokenizer(self._model)
        self._tokenizer.update_options(add_special_tokens="true")
        self.ids = [int(token) for token in self._tokenizer.encode(prompt)]

    def generator(self, tokens: int) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(self.ids) + tokens)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(self.ids)
        return generator

    def generate(self, tokens: int) -> tuple[list[int], str]:
        """The ids that come after the prompt, and the whole text."""
        generator = self.generator(tokens)
        while not generator.is_done():
            generator.generate_next_token()
        sequence = [int(token) for token in generator.get_sequence(0)]
        return sequence[len(self.ids) :], self._tokenizer.decode(np.array(sequence, np.int32))

    def logits(self) -> np.ndarray:
        """Float32 [T, V] of the prompt."""
        return self.generator(1).get_output("logits")[0]


def own_logits(bundle: Bundle, ids: list[int]) -> np.ndarray:
    """The same from the session that the bundle is measured with."""
    from afq_export.backends.onnxruntime import open_session

    return open_session(bundle).logits(torch.tensor(ids)).numpy()


def assert_same_text(bundle: Bundle, prompt: str, tokens: int) -> None:
    ours = generate(bundle, prompt, tokens)
    theirs = GenAI(bundle.folder, prompt)
    ids, text = theirs.generate(tokens)
    ends = read_config(bundle.folder)[0].eos_ids
    assert [token for token in ids if token not in ends] == list(ours.ids)
    assert theirs.ids == load_folder_tokenizer(bundle.folder)(prompt)["input_ids"]
    assert text.strip() == (prompt + ours.text).strip()


CASES = [("demo-llama", "w4a8-g32"), ("demo-opt", "w8a8-static"), ("demo-llama", "w8a8-dynamic")]


@needs_genai
@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_genai_writes_the_text_that_generate_writes(lowered: Callable, model: str, recipe: str) -> None:
    assert_same_text(lowered(model, recipe), PROMPT, TOKENS)


@needs_genai
@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_genais_logits_are_the_sessions_bit_for_bit(lowered: Callable, model: str, recipe: str) -> None:
    bundle = lowered(model, recipe)
    theirs = GenAI(bundle.folder)
    assert np.array_equal(theirs.logits(), own_logits(bundle, theirs.ids))


@needs_genai
def test_session_options_reach_the_session(lowered: Callable, tmp_path: Path) -> None:
    """Weight-only int4 is level 0; without the entry ONNX Runtime takes level 4, and the logits are others."""
    bundle = lowered("demo-llama", "w4a16-g32")
    theirs = GenAI(bundle.folder)
    assert np.array_equal(theirs.logits(), own_logits(bundle, theirs.ids))
    changed = Path(shutil.copytree(bundle.folder, tmp_path / "changed"))
    config = json.loads((changed / GENAI_CONFIG).read_text())
    assert config["model"]["decoder"]["session_options"].pop(LEVEL) == "0"
    (changed / GENAI_CONFIG).write_text(json.dumps(config))
    assert not np.array_equal(GenAI(changed).logits(), theirs.logits())


@needs_genai
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["w4a8-g32", "w8a8-static", "w8a8-dynamic"])
def test_the_same_with_models_of_others(lowered: Callable, name: str, recipe: str) -> None:
    if not MODELS[name]:
        pytest.skip(f"AFQ_TEST_{name} does not name the model")
    assert_same_text(lowered(MODELS[name], recipe), "Once upon a time", 100)
