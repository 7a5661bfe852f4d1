"""The model's tokenizer, and its files for the bundle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from afq_export.errors import InputError
from afq_export.load.checkpoint import FloatCheckpoint


def open_tokenizer(checkpoint: FloatCheckpoint) -> Any:
    """The fast tokenizer of the model. Raises InputError when there is none or its ids exceed the embedding."""
    if checkpoint.files is None:
        raise InputError("the model has no tokenizer", where=checkpoint.name)
    try:
        if checkpoint.gguf is not None:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.files, gguf_file=checkpoint.gguf.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.files, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many types on broken files
        raise InputError("cannot read the tokenizer", where=checkpoint.name, why=str(error).split("\n")[0]) from error
    if not tokenizer.is_fast:
        raise InputError("the tokenizer has no fast version", where=checkpoint.name, do="save a tokenizer.json")
    largest = max(tokenizer.get_vocab().values())
    if largest >= checkpoint.config.vocab:
        raise InputError(
            "tokenizer and embedding do not fit",
            where=checkpoint.name,
            why=f"the largest token id is {largest}, the embedding has {checkpoint.config.vocab} rows",
        )
    tokenizer.model_max_length = int(1e30)  # windows are cut by us; a warning about long texts would mislead
    return tokenizer


def load_folder_tokenizer(folder: Path) -> Any:
    """The tokenizer of a bundle. Raises InputError when it is not there."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError("cannot read the tokenizer", where=str(folder), why=str(error).split("\n")[0]) from error
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the tokenizer's behaviour: its canonical JSON (vocabulary, merges, normalisers, special tokens)."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
