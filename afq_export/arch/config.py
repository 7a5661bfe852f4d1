"""What a decoder is made of, in our own words, whatever file it came from."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: `inv_freq` [d/2] in float32 bits and the factor on cos and sin (RoPE scaling included)."""

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder-only Transformer.

    `position_offset` is added to learned positions (2 in OPT). `max_positions` bounds the context.
    """

    family: Literal["llama", "opt"]
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    norm_eps: float
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"]
    tied: bool
    rope: Rope | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    position_offset: int = 0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def repeats(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def to_dict(self) -> dict:
        """Plain data, for quant.json."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict) -> DecoderConfig:
        """Inverse of `to_dict`. Raises TypeError on unknown or missing keys."""
        data = dict(data)
        rope = data.pop("rope", None)
        data["eos_ids"] = tuple(data.get("eos_ids", ()))
        if rope is not None:
            rope = Rope(tuple(rope["inv_freq"]), rope["attention_factor"])
        return DecoderConfig(rope=rope, **data)
