"""Random Hugging Face model folders, written to disk as their owners would, for tests that load models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, OPTConfig, PreTrainedTokenizerFast, Qwen2Config

from afq_export.arch.config import DecoderConfig, Rope
from afq_export.load.config import decoder_config
from afq_export.load.model import expected_shapes

VOCAB = 260


def llama_config(**changes: object) -> DecoderConfig:
    """A small Llama with grouped queries, in our own words; no file needed."""
    base = dict(
        family="llama",
        model_type="llama",
        hidden=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate=64,
        vocab=VOCAB,
        max_positions=64,
        norm_eps=1e-5,
        activation="silu",
        tied=True,
        rope=Rope((1.0, 0.1, 0.01, 0.001)),
    )
    return DecoderConfig(**{**base, **changes})


def opt_config(**changes: object) -> DecoderConfig:
    """A small OPT with biases everywhere."""
    base = dict(
        family="opt",
        model_type="opt",
        hidden=32,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=8,
        intermediate=64,
        vocab=VOCAB,
        max_positions=64,
        norm_eps=1e-5,
        activation="relu",
        tied=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        position_offset=2,
    )
    return DecoderConfig(**{**base, **changes})


def hf_config(kind: str):
    """The transformers configuration of a small model."""
    common = dict(
        vocab_size=VOCAB,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    if kind == "opt":
        return OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            dropout=0.0,
            **common,
        )
    if kind == "llama-biased":  # grouped queries and biases on q, k, v and o: shifts fold per KV head
        common["attention_bias"] = True
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return (Qwen2Config if kind == "qwen2" else LlamaConfig)(**sizes, **common)


def random_tensors(config: DecoderConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Checkpoint key -> random tensor of everything the family reads; norms near 1, one loud channel."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in key:
            values = 1 + 0.2 * values if key.endswith("weight") else 0.2 * values
            if key.endswith("weight") and len(values) == config.hidden:
                values[3] *= 8
        else:
            values = values * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        tensors[key] = values
    return tensors


def write_model(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A complete model folder: config.json, model.safetensors, byte-level tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = hf_config(kind)
    raw.save_pretrained(folder)
    save_file(random_tensors(decoder_config(raw, str(folder)), seed), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token per byte, `<s>` 256 and `</s>` 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def edit_config(folder: Path, **changes: object) -> None:
    """Changes fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
