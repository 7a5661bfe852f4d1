"""One trained Llama, re-expressed exactly as other architectures: the same function, so its weights test every path.

    python examples/carriers.py mha ../shared/data/stories260K afq-out/carriers/stories260K-mha

    mha      every KV head repeated for each of its query heads: a Llama without grouped queries
    qwen2    zero biases on q, k and v: a Qwen2
    mistral  the same tensors under Mistral's name, without a sliding window

The carrier's logits are the original's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Config = dict[str, Any]
Tensors = dict[str, Tensor]
WEIGHTS = "model.safetensors"


def main() -> None:
    """Writes one carrier."""
    arguments = parse()
    print(write_carrier(arguments.kind, arguments.source, arguments.folder))


def write_carrier(kind: str, source: Path, folder: Path) -> Path:
    """Writes the Llama in `source` (one safetensors file) to `folder` as `kind`, with its tokenizer; returns `folder`.

    Raises ValueError when the configuration has what the other architecture lacks.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config, tensors = CARRIERS[kind](config, load_file(source / WEIGHTS))
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(WEIGHTS, "config.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def as_mha(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Rows of k and v, head by head, once for every query head that reads them."""
    kv_heads, heads = config["num_key_value_heads"], config["num_attention_heads"]

    def repeated(key: str, tensor: Tensor) -> Tensor:
        if not key.endswith(("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")):
            return tensor
        by_head = tensor.unflatten(0, (kv_heads, -1))
        return by_head.repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1)

    return config | {"num_key_value_heads": heads}, {key: repeated(key, tensor) for key, tensor in tensors.items()}


def as_qwen2(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Zero biases, which Qwen2 has on q, k and v and nowhere else."""
    refuse_biases(config, "Qwen2")
    refuse_other_head_size(config, "Qwen2")
    rows = [key for key in tensors if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
    zeros = {key.removesuffix("weight") + "bias": torch.zeros_like(tensors[key][:, 0]) for key in rows}
    return renamed(config, "qwen2", "Qwen2ForCausalLM", use_sliding_window=False), tensors | zeros


def as_mistral(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Another name."""
    refuse_biases(config, "Mistral")
    return renamed(config, "mistral", "MistralForCausalLM", sliding_window=None), tensors


CARRIERS: dict[str, Callable[[Config, Tensors], tuple[Config, Tensors]]] = {
    "mha": as_mha,
    "qwen2": as_qwen2,
    "mistral": as_mistral,
}


def renamed(config: Config, model_type: str, architecture: str, **more: Any) -> Config:
    """`config` under another architecture's name, without the fields that only Llama has."""
    kept = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias", "pretraining_tp")}
    return kept | {"model_type": model_type, "architectures": [architecture]} | more


def refuse_biases(config: Config, name: str) -> None:
    """Raises ValueError when linears have biases."""
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"{name} has no place for this model's biases")


def refuse_other_head_size(config: Config, name: str) -> None:
    """Raises ValueError when the head size is not hidden / heads."""
    usual = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") not in (None, usual):
        raise ValueError(f"{name} has heads of hidden / heads = {usual}, not {config['head_dim']}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(CARRIERS))
    parser.add_argument("source", type=Path, help="folder of a Llama")
    parser.add_argument("folder", type=Path, help="where the carrier goes; must not exist")
    return parser.parse_args()


if __name__ == "__main__":
    main()
