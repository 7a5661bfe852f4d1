"""Hugging Face configuration -> DecoderConfig, or the reason why the model is not supported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from optimum.utils import NormalizedConfigManager
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from afq_export.arch.config import LARGEST, DecoderConfig, Rope
from afq_export.arch.decoder import FAMILIES
from afq_export.errors import InputError

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
GENERATION = "generation_config.json"
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not change with the sequence; the others cannot be constants of a program."""


def read_config(folder: Path, gguf: Path | None = None) -> tuple[DecoderConfig, Any]:
    """The configuration in `folder` (or inside the GGUF file) and the transformers object it came from.

    Raises InputError when there is none, it does not parse, or the architecture is not supported.
    """
    where = str(gguf or folder)
    try:
        if gguf is not None:
            raw = AutoConfig.from_pretrained(folder, gguf_file=gguf.name)
        else:
            raw = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, JSON and GGUF errors of its own
        raise InputError(
            "cannot read the model's configuration",
            where=where,
            why=str(error).split("\n")[0],
            do=f"give a folder with config.json of one of: {', '.join(model_types())}",
        ) from error
    config = decoder_config(raw, where)
    return (config if gguf else _with_generation(config, folder)), raw


def _with_generation(config: DecoderConfig, folder: Path) -> DecoderConfig:
    """End-of-text ids of generation_config.json, where it names any: it is what generation goes by."""
    path = folder / GENERATION
    if not path.is_file():
        return config
    try:
        ids = _ids(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError("cannot read the generation configuration", where=str(path), why=str(error)) from error
    return dataclasses.replace(config, eos_ids=ids or config.eos_ids)


def model_types() -> tuple[str, ...]:
    """All supported `model_type` values."""
    return tuple(name for module in FAMILIES.values() for name in module.MODEL_TYPES)


def decoder_config(raw: Any, where: str) -> DecoderConfig:
    """DecoderConfig of a transformers configuration. Raises InputError with the option that is not supported."""
    family = next((name for name, module in FAMILIES.items() if raw.model_type in module.MODEL_TYPES), None)
    if family is None:
        raise InputError(
            "unknown architecture", where=where, why=raw.model_type, do=f"supported: {', '.join(model_types())}"
        )
    normal = NormalizedConfigManager.get_normalized_config_class(raw.model_type)(raw)
    build = _opt if family == "opt" else _llama
    _refuse_sizes(raw, where)
    try:
        config = build(raw, normal, where)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise InputError("the model's configuration does not fit", where=where, why=str(error)) from error
    _check_sizes(config, where)
    return config


def _llama(raw: Any, normal: Any, where: str) -> DecoderConfig:
    hidden, heads = normal.hidden_size, normal.num_attention_heads
    head_dim = getattr(raw, "head_dim", None) or hidden // heads
    biased = raw.model_type == "qwen2" or bool(getattr(raw, "attention_bias", False))
    return DecoderConfig(
        family="llama",
        model_type=raw.model_type,
        hidden=hidden,
        layers=normal.num_layers,
        heads=heads,
        kv_heads=getattr(raw, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        intermediate=raw.intermediate_size,
        vocab=normal.vocab_size,
        max_positions=_positions(raw),
        norm_eps=raw.rms_norm_eps,
        activation=_activation(raw.hidden_act, where),
        tied=bool(raw.tie_word_embeddings),
        rope=_rope(raw, head_dim, where),
        qkv_bias=biased,
        out_bias=bool(getattr(raw, "attention_bias", False)) and raw.model_type != "qwen2",
        mlp_bias=bool(getattr(raw, "mlp_bias", False)),
        qk_norm=raw.model_type == "qwen3",
        bos_id=raw.bos_token_id,
        eos_ids=_ids(raw.eos_token_id),
    )


def _opt(raw: Any, normal: Any, where: str) -> DecoderConfig:
    unsupported = {
        "do_layer_norm_before is false": not raw.do_layer_norm_before,
        "word_embed_proj_dim differs from hidden_size": raw.word_embed_proj_dim != raw.hidden_size,
        "layer norms have no affine weights": not raw.layer_norm_elementwise_affine,
        "there is no final layer norm": bool(raw._remove_final_layer_norm),
    }
    for reason, present in unsupported.items():
        if present:
            raise InputError("this OPT variant is not supported", where=where, why=reason)
    return DecoderConfig(
        family="opt",
        model_type="opt",
        hidden=normal.hidden_size,
        layers=normal.num_layers,
        heads=normal.num_attention_heads,
        kv_heads=normal.num_attention_heads,
        head_dim=normal.hidden_size // normal.num_attention_heads,
        intermediate=raw.ffn_dim,
        vocab=normal.vocab_size,
        max_positions=raw.max_position_embeddings,
        norm_eps=1e-5,
        activation=_activation(raw.activation_function, where),
        tied=bool(raw.tie_word_embeddings),
        qkv_bias=bool(raw.enable_bias),
        out_bias=bool(raw.enable_bias),
        mlp_bias=bool(raw.enable_bias),
        position_offset=2,
        bos_id=raw.bos_token_id,
        eos_ids=_ids(raw.eos_token_id),
    )


def _rope(raw: Any, head_dim: int, where: str) -> Rope:
    """Frequencies as transformers computes them, so that every scaling it knows is the same here."""
    parameters = dict(raw.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if kind not in _FIXED_ROPE:
        raise InputError(
            "RoPE scaling not supported",
            where=where,
            why=f"rope_type {kind!r}: its frequencies change with the sequence, a program has constants",
            do=f"supported: {', '.join(_FIXED_ROPE)}",
        )
    config = LlamaConfig(
        hidden_size=raw.hidden_size,
        num_attention_heads=raw.num_attention_heads,
        head_dim=head_dim,
        max_position_embeddings=raw.max_position_embeddings,
        rope_parameters=parameters,
    )
    table = LlamaRotaryEmbedding(config)
    return Rope(tuple(table.inv_freq.float().tolist()), float(table.attention_scaling))


def _positions(raw: Any) -> int:
    """The longest context; a sliding window ends it, because full attention is the same function only within it."""
    window = getattr(raw, "sliding_window", None) if getattr(raw, "use_sliding_window", True) else None
    return min(raw.max_position_embeddings, window) if window else raw.max_position_embeddings


def _activation(name: str, where: str) -> Any:
    if name not in _ACTIVATIONS:
        raise InputError("activation not supported", where=where, why=name, do=f"supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "ffn_dim", "vocab_size", "max_position_embeddings", "word_embed_proj_dim",
)  # fmt: skip
"""What must be a number that memory has room for, before anything is computed from it."""


def _refuse_sizes(raw: Any, where: str) -> None:
    for name in SIZES:
        value = getattr(raw, name, None)
        if value is not None and (type(value) is not int or not 1 <= value <= LARGEST):
            raise InputError("the model's configuration does not fit", where=where, why=f"{name} is {str(value)[:40]}")


def _check_sizes(config: DecoderConfig, where: str) -> None:
    if why := config.contradiction():
        raise InputError("the model's configuration contradicts itself", where=where, why=why)
