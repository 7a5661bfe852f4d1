"""The model's tokenizer, and its files for the bundle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from afq_export.errors import InputError, VerdictError
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.stdout import standard_output_closed


def open_tokenizer(checkpoint: FloatCheckpoint) -> Any:
    """The fast tokenizer of the model. Raises InputError when there is none or its ids exceed the embedding."""
    if checkpoint.files is None:
        raise InputError("the model has no tokenizer", where=checkpoint.name)
    tokenizer = _read(checkpoint.files, checkpoint.name, checkpoint.gguf)
    if not tokenizer.is_fast:
        raise InputError("the tokenizer has no fast version", where=checkpoint.name, do="save a tokenizer.json")
    largest = max(tokenizer.get_vocab().values())
    if largest >= checkpoint.config.vocab:
        raise InputError(
            "tokenizer and embedding do not fit",
            where=checkpoint.name,
            why=f"the largest token id is {largest}, the embedding has {checkpoint.config.vocab} rows",
        )
    return tokenizer


def load_folder_tokenizer(folder: Path) -> Any:
    """The tokenizer of a bundle. Raises InputError when it is not there."""
    return _read(folder, str(folder))


def _read(folder: Path, name: str, gguf: Path | None = None) -> Any:
    """The tokenizer in `folder` or in a GGUF file there; `name` is for the error.

    A tokenizer.json is taken as it stands, because that is what runs on the device: AutoTokenizer would rather build
    the class that it knows for the architecture, with that class' own rules and tokens.
    """
    try:
        with standard_output_closed():  # tokenizers before 0.23 print there that a vocabulary has holes
            if gguf is not None:
                tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
            elif (folder / "tokenizer.json").is_file():
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many types on broken files
        raise InputError("cannot read the tokenizer", where=name, why=str(error).split("\n")[0]) from error
    tokenizer.model_max_length = int(1e30)  # windows are cut by us; a warning about long texts would mislead
    model = getattr(tokenizer, "backend_tokenizer", None) and tokenizer.backend_tokenizer.model
    if hasattr(model, "_resize_cache"):
        model._resize_cache(0)  # tokenizers 0.23 never frees what it remembers of a text, 4 MB of 0.5; it is as fast
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the tokenizer's behaviour: its canonical JSON (vocabulary, merges, normalisers, special tokens)."""
    with standard_output_closed():
        data = json.loads(tokenizer.backend_tokenizer.to_str())
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def refuse_other_tokenizer(shipped: Any, source: Any, ids_T: Tensor, where: str) -> None:
    """Raises VerdictError unless two tokenizers have one vocabulary and give and take the text of `ids_T` alike.

    Not their digests: what `save_pretrained` writes may differ from what it was read from and mean the same.
    """
    text = source.decode(ids_T)
    differences = {
        "vocabularies differ": shipped.get_vocab() != source.get_vocab(),
        "the same text has other token ids": _ids(shipped, text) != _ids(source, text),
        "the same token ids have another text": shipped.decode(ids_T) != text,
        "begin or end tokens differ": _ends(shipped) != _ends(source),
    }
    why = next((reason for reason, present in differences.items() if present), "")
    if why:
        raise VerdictError("the bundle's tokenizer is not the model's", where=where, why=why, do="export it again")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def _ends(tokenizer: Any) -> tuple[int | None, int | None]:
    return tokenizer.bos_token_id, tokenizer.eos_token_id
