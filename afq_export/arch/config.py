"""What a decoder is made of, in our own words, whatever file it came from."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: `inv_freq` [d/2] in float32 bits and the factor on cos and sin (RoPE scaling included)."""

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


LARGEST, MOST_LAYERS = 1 << 27, 1 << 14
"""Beyond any model's sizes: what a broken file says."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder-only Transformer.

    `position_offset` is added to learned positions (2 in OPT). `max_positions` bounds the context. `down_hadamard` is
    the size of the Hadamard matrices that the program multiplies the input of the MLP's last linear by; 0: none.
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
    down_hadamard: int = 0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def repeats(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def to_dict(self) -> dict:
        """Plain data, for quant.json."""
        return dataclasses.asdict(self)

    def contradiction(self) -> str:
        """Why no decoder has these sizes; empty when one may."""
        sizes = (self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim, self.intermediate)
        if min(*sizes, self.vocab, self.max_positions) < 1:
            return f"sizes {sizes}"
        if max(*sizes, self.vocab, self.max_positions) > LARGEST or self.layers > MOST_LAYERS:
            return f"sizes {sizes}, larger than any model's"
        uneven = self.heads % self.kv_heads or (self.rope is not None and self.head_dim % 2)
        split = self.family == "opt" and self.heads * self.head_dim != self.hidden
        if uneven or split:
            return f"{self.heads} query heads, {self.kv_heads} KV heads, sizes {sizes}"
        if self.rope is not None and len(self.rope.inv_freq) != self.head_dim // 2:
            return f"{len(self.rope.inv_freq)} rotary frequencies for heads of {self.head_dim}"
        return ""
