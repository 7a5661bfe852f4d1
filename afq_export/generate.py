"""Greedy text from a bundle, through its real runtime and with its own tokenizer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from afq_export.backends import backend
from afq_export.errors import InputError
from afq_export.load.tokenizer import load_folder_tokenizer
from afq_export.lower.bundle import Bundle
from afq_export.spec.strict import Data


class Generated(Data):
    """`text` is what was added to `prompt`; `stopped`: an end-of-text token came."""

    prompt: str
    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    stopped: bool
    seconds: float


def generate(bundle: Bundle, prompt: str, tokens: int, *, chat: bool = False) -> Generated:
    """At most `tokens` tokens after `prompt`. `chat`: the prompt is a user's message in the model's chat template.

    Raises InputError when the prompt has no token, is longer than the program's context, or there is no template.
    """
    tokenizer = load_folder_tokenizer(bundle.folder)
    ids = _ids(tokenizer, prompt, chat, bundle.folder)
    session = backend(bundle.backend).open_session(bundle)
    stop = _stop_ids(bundle.folder)
    start = time.perf_counter()
    found = session.generate(torch.tensor(ids), tokens, stop)
    seconds = time.perf_counter() - start
    # Some tokenizers drop the blank in front of a first token: the text is what the whole has more than the prompt.
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids + found))
    full = len(found) < tokens and len(ids) + len(found) <= session.context
    return Generated(prompt, whole[len(before) :], tuple(found), len(ids), full, round(seconds, 3))


def _ids(tokenizer: Any, prompt: str, chat: bool, folder: Path) -> list[int]:
    if not chat:
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        raise InputError("the model has no chat template", where=str(folder), do="leave --chat out")
    if not ids:
        raise InputError("the prompt has no token", where=repr(prompt), do="give a --prompt with text")
    return list(ids)


def _stop_ids(folder: Path) -> frozenset[int]:
    """End-of-text ids of generation_config.json."""
    path = folder / "generation_config.json"
    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)
