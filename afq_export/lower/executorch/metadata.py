"""The constant methods of a program: what ExecuTorch's own LLM runner asks before it generates."""

from __future__ import annotations

from afq_export.arch.config import DecoderConfig


def metadata(config: DecoderConfig, context: int, prefill: int) -> dict[str, int | bool | list[int]]:
    """Names and values as extension/llm/runner reads them.

    The runner cuts a prompt into calls of `get_max_seq_len` tokens and stops at `get_max_context_len`. Token ids that
    the model does not state are left out: the runner then takes the tokenizer's.
    """
    values: dict[str, int | bool | list[int]] = {
        "get_max_seq_len": prefill,
        "get_max_context_len": context,
        "get_vocab_size": config.vocab,
        "get_n_layers": config.layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    if config.bos_id is not None:
        values["get_bos_id"] = config.bos_id
    if config.eos_ids:
        values["get_eos_ids"] = list(config.eos_ids)
    return values
