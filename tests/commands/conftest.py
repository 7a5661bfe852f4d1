"""A small random model with a tokenizer, texts to calibrate and evaluate on, and one finished tiny run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from afq_export.cli import call

WORDS = ("the", "a", "cat", "dog", "sun", "moon", "ran", "sat", "saw", "big", "red", "little", "under", "over", "tree")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: two Llama blocks with random weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Paths of a calibration and of an evaluation text that share no line."""
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("calib.txt", 1), ("eval.txt", 2)):
        chosen = random.Random(seed)
        lines = (" ".join(chosen.choices(WORDS, k=12)) for _ in range(80))
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "calib.txt"), str(folder / "eval.txt")


@pytest.fixture(scope="session")
def asked(model: Path, texts: tuple[str, str]) -> list[str]:
    """The options of every tiny run: one thread, so that bytes can be compared."""
    return ["--model", str(model), "--calib", texts[0], "--eval", texts[1], "--tiny", "--threads", "1"]


@pytest.fixture(scope="session")
def finished(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run that ended well."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert call(["run", *asked, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused: nothing on standard output, one line on standard error, which is
    returned without its `error: `."""

    def run(*arguments: str, code: int = 2) -> str:
        capfd.readouterr()
        assert call(arguments) == code
        out, err = capfd.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run
