"""ExecuTorch's own text generation, the loop of its demo apps, on our program."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from afq_export.lower.executorch.program import lower_program
from afq_export.progress import silent
from afq_export.runtime.executorch import ExecutorchSession
from afq_export.runtime.library import quiet
from afq_export.spec.target import Shapes
from tests.checkpoints import random_checkpoint, small_config
from tests.lower.reference import TARGET

CONTEXT, PREFILL = 96, 16
BOS, EOS = "<s>", "</s>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token for each printable ASCII letter, and no other: the runner reports tokens as UTF-8 text."""
    names = [BOS, EOS, *map(chr, range(33, 127))]
    built = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    built.add_special_tokens([BOS, EOS])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    built.save(str(path))
    return path


@pytest.mark.parametrize("length", [5, 3 * PREFILL + 7], ids=["one call", "a prompt longer than a call"])
def test_runner_generates_what_the_session_does(length: int, tokenizer: Path, tmp_path: Path) -> None:
    vocabulary = Tokenizer.from_file(str(tokenizer))
    config = small_config(vocab=vocabulary.get_vocab_size(), max_positions=CONTEXT, bos_id=None, eos_ids=(1,))
    checkpoint = random_checkpoint(tmp_path / "quantized", config, "qd8-f32-qb4w")
    path = tmp_path / "model.pte"
    target = msgspec.structs.replace(TARGET, shapes=Shapes(context=CONTEXT, prefill=PREFILL))
    path.write_bytes(lower_program(checkpoint, target, silent).pte)

    prompt = "".join(chr(97 + place % 26) for place in range(length))
    ids = torch.tensor(vocabulary.encode(prompt).ids)
    assert len(ids) == length
    expected = ExecutorchSession(path).generate(ids, 8, frozenset({1}))
    pieces = [piece for piece in run(path, tokenizer, prompt, 8) if piece != EOS]
    assert pieces == [vocabulary.decode([token], skip_special_tokens=False) for token in expected]


def run(program: Path, tokenizer: Path, prompt: str, tokens: int) -> list[str]:
    """The pieces of text that the runner reports."""
    with quiet():
        from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

        pieces: list[str] = []
        runner = TextLLMRunner(str(program), str(tokenizer))
        settings = GenerationConfig(echo=False, max_new_tokens=tokens, temperature=0.0)
        runner.generate(prompt, settings, token_callback=pieces.append)
    return pieces
