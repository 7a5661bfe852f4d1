"""Our decoders against Hugging Face's own, on tiny random models of every family and option."""

from __future__ import annotations

import pytest
import torch

from afq_export.arch import decoder
from afq_export.arch.ops import FloatOps
from afq_export.load.model import open_model

transformers = pytest.importorskip("transformers")

COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GATED = COMMON | {"intermediate_size": 80, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
OPT = COMMON | {"ffn_dim": 80, "word_embed_proj_dim": 48}

CASES = {
    "llama-gqa": ("Llama", GATED),
    "llama-mha": ("Llama", GATED | {"num_key_value_heads": 4}),
    "llama-mqa-tied": ("Llama", GATED | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", GATED | {"head_dim": 20}),
    "llama-biases": ("Llama", GATED | {"attention_bias": True, "mlp_bias": True}),
    "llama-theta": ("Llama", GATED | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-llama3": ("Llama", GATED | {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", GATED | {"rope_parameters": YARN}),
    "llama-linear": ("Llama", GATED | {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", GATED | {"sliding_window": None}),
    "qwen2": ("Qwen2", GATED),
    "qwen2-tied": ("Qwen2", GATED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", GATED | {"head_dim": 20}),
    "opt": ("OPT", OPT | {"tie_word_embeddings": True}),
    "opt-untied": ("OPT", OPT),
}


def random_model(name: str, options: dict):
    """A Hugging Face model with weights large enough that every part matters: norms, biases and all."""
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            is_norm = "norm" in key and key.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else noise * (0.5 if parameter.dim() == 1 else 0.25))
    return model


def our_logits(model, ids, dtype):
    """The whole decoder, read through the loader's own path."""
    x = decoder.embed(model.config, model.embedding(dtype), ids)
    for index in range(model.config.layers):
        x = decoder.block(model.config, FloatOps(model.config, model.block(index, dtype)), x)
    return decoder.head(FloatOps(model.config, model.head(dtype)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path, case, dtype):
    theirs = random_model(*CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = open_model(str(tmp_path))
    ids = torch.randint(61, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.to(dtype)(ids).logits
        got = our_logits(ours, ids, dtype)
    assert got.dtype is dtype
    # transformers computes norms and softmax of a float64 Llama in float32 in places: both dtypes agree to float32.
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < 2e-5, error
    assert float(expected.std()) > 0.1
