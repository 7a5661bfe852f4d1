"""genai_config.json: what onnxruntime-genai 0.18 needs beside model.onnx and the tokenizer to generate text.

The graph is not changed for it. GenAI finds out from the session which inputs there are: one that the graph does not
have (`position_ids` of OPT) is not fed. What it is told here:

1. `model.type` picks the class that drives the graph. All plain decoders have the same class; a family that GenAI has
   no name for is a `decoder`, its name for a decoder without one.
2. `past_present_share_buffer` is off: the caches grow by concatenation. With it on, GenAI would hand out buffers of
   `max_length` rows, which only its own attention operator reads rightly.
3. Session options decide the arithmetic, so they are the target's. GenAI has its own names for a few of them and hands
   on every other key, its value a string, as a configuration entry of the session. ONNX Runtime ignores entries it does
   not know, without a word: whatever does not look like one is refused here.
4. Greedy search, so that the text is the one that the bundle was checked with; an application sets what it likes.

The tokenizer is tokenizer.json with tokenizer_config.json, as `save_pretrained` of transformers 5 writes them. GenAI
leaves out the begin token that a tokenizer puts in front of a text, because chat templates have it; an application that
gives plain text to such a model asks for it: `tokenizer.update_options(add_special_tokens="true")`.

Source: src/config.cpp, src/models/model.cpp and src/models/model_type.h of microsoft/onnxruntime-genai (release 0.18).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from afq_export.arch.config import DecoderConfig
from afq_export.errors import InputError
from afq_export.quantize.cache import row_size
from afq_export.spec.recipe import FLOAT_CACHE, KvCache

GENAI_CONFIG = "genai_config.json"
"""The file's name in the bundle."""
PLAIN_DECODER = "decoder"
"""The type of a decoder that GenAI has no own name for."""
OWN_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types, of those that afq-export reads, that GenAI knows by name."""

OPTIMIZATION = "graph_optimization_level"
LEVELS = ("disable_all", "enable_basic", "enable_extended", "enable_all")
"""What GenAI reads; `layout`, between the last two in ONNX Runtime, it does not."""
THREADS = ("intra_op_num_threads", "inter_op_num_threads")
ENTRY = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)+")
"""A configuration entry of ONNX Runtime: `session.x64quantprecision`, `ep.dynamic.workload_type`."""


def genai_config(
    config: DecoderConfig, context: int, session: Mapping[str, str | int], kv_cache: KvCache = FLOAT_CACHE
) -> str:
    """The text of genai_config.json for a graph whose sequences have `context` tokens at most.

    `session`: `graph_optimization_level` (`basic` or `ORT_ENABLE_BASIC`, and so on), numbers of threads, and
    configuration entries by their keys. Raises InputError for an option that GenAI would not hand on, and for a context
    that the model does not have.
    """
    if not 1 <= context <= config.max_positions:
        raise InputError(
            "the context does not fit the model",
            where="genai_config.json",
            why=f"{context} tokens, the model has {config.max_positions} positions",
        )
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids"}
    if config.rope is None:  # learned positions come from the attention mask
        del inputs["position_ids"]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **session_options(session)},
        "filename": "model.onnx",
        "head_size": row_size(kv_cache, config.head_dim),  # of the caches, which GenAI makes: nothing else asks
        "hidden_size": config.hidden,
        "inputs": inputs | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")},
        "outputs": {"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")},
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
    }
    model = {
        "type": config.model_type if config.model_type in OWN_TYPES else PLAIN_DECODER,
        "vocab_size": config.vocab,
        "context_length": context,
        **_special_tokens(config),
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "max_length": context,
        "past_present_share_buffer": False,
    }
    return json.dumps({"model": model, "search": search}, indent=2) + "\n"


def session_options(session: Mapping[str, str | int]) -> dict[str, str | int]:
    """`session` in GenAI's words. Raises InputError for what it would not hand on to ONNX Runtime."""
    return {key: _option(key, value) for key, value in sorted(session.items())}


def _option(key: str, value: str | int) -> str | int:
    if key == OPTIMIZATION:
        level = str(value).lower().removeprefix("ort_").removeprefix("enable_")
        level = {"disable": "disable_all", "none": "disable_all"}.get(level, level)
        found = [name for name in LEVELS if level in (name, name.removeprefix("enable_"))]
        if not found:
            raise _refused(key, value, f"GenAI knows {', '.join(LEVELS)}")
        return f"ORT_{found[0].upper()}"
    if key in THREADS:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _refused(key, value, "a number of threads is a whole number")
        return value
    if not ENTRY.fullmatch(key):
        raise _refused(key, value, "it is neither an option that GenAI reads nor a configuration entry of ONNX Runtime")
    return str(int(value)) if isinstance(value, bool) else str(value)


def _refused(key: str, value: str | int, why: str) -> InputError:
    return InputError("session option not possible in GenAI", where=f"{key} = {value!r}", why=why)


def _special_tokens(config: DecoderConfig) -> dict[str, int | list[int]]:
    """Where a text begins and ends. Padding never comes into one sequence, but GenAI asks for it: an end token."""
    ends = list(config.eos_ids)
    tokens: dict[str, int | list[int]] = {} if config.bos_id is None else {"bos_token_id": config.bos_id}
    if ends:
        tokens["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        tokens["pad_token_id"] = ends[0]
    return tokens
