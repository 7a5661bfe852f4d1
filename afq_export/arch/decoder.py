"""The decoder as a whole, from a family's parts: embed, blocks, head."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from afq_export.arch import llama, opt
from afq_export.arch.attention import causal_attention, rope_tables
from afq_export.arch.config import DecoderConfig
from afq_export.arch.ops import Ops, Weights

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

FAMILIES: dict[str, ModuleType] = {"llama": llama, "opt": opt}
"""Family name -> its module. Adding a family is adding a file and this line."""


def family(config: DecoderConfig) -> ModuleType:
    """The module with the functions of the config's family."""
    return FAMILIES[config.family]


def rope_for(
    config: DecoderConfig, tokens: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor] | None:
    """cos and sin for positions 0..tokens-1, None when the family has learned positions."""
    return rope_tables(config.rope, torch.arange(tokens, device=device), dtype) if config.rope else None


def embed(config: DecoderConfig, weights: Weights, ids_BT: Tensor) -> Tensor:
    """Hidden states [B, T, D] of a sequence that starts at position 0."""
    rows = weights["embed_tokens.weight"][ids_BT]
    return family(config).embed(config, rows, weights, torch.arange(ids_BT.shape[1], device=ids_BT.device))


def block(config: DecoderConfig, ops: Ops, x_BTD: Tensor) -> Tensor:
    """One Transformer block over whole sequences. Returns [B, T, D]."""
    return run_block(config, ops, x_BTD, causal_attention)


def run_block(config: DecoderConfig, ops: Ops, x_BTD: Tensor, attend: Attend) -> Tensor:
    """The same with `attend`(q, k, v) for attention, unless `ops` have attention of their own (arch/static.py)."""
    return family(config).attention_out(config, ops, x_BTD, attended(config, ops, x_BTD, attend))


def attended(config: DecoderConfig, ops: Ops, x_BTD: Tensor, attend: Attend = causal_attention) -> Tensor:
    """The first half of a block: what attention gives [B, T, H, d], before its projection."""
    rope = rope_for(config, x_BTD.shape[1], x_BTD.dtype, x_BTD.device)
    return getattr(ops, "attend", attend)(*family(config).attention_in(config, ops, x_BTD, rope))


def head(ops: Ops, x_BTD: Tensor) -> Tensor:
    """Logits [B, T, V]: final norm, then lm_head."""
    return ops.linear("lm_head", ops.norm("final_norm", x_BTD))
