"""Rotary embedding and causal attention, shared by all families."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.arch.config import Rope


def rope_tables(rope: Rope, positions_T: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin [T, d] for `positions_T`, in the half-rotated layout of Hugging Face Llama.

    Angles are float32 products as in transformers, whatever `dtype` is, so that a float64 run is the same function.
    """
    frequencies = torch.tensor(rope.inv_freq, dtype=torch.float32, device=positions_T.device)
    angles = positions_T.float()[:, None] * frequencies[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * rope.attention_factor).to(dtype), (angles.sin() * rope.attention_factor).to(dtype)


def apply_rope(x_BTHd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotates dimension pairs (j, j + d/2) by the position's angle (RoFormer, arXiv 2104.09864, eq. 34)."""
    half = x_BTHd.shape[-1] // 2
    first, second = x_BTHd[..., :half], x_BTHd[..., half:]
    rotated = torch.cat((-second, first), dim=-1)
    return x_BTHd * cos_Td[:, None, :] + rotated * sin_Td[:, None, :]


def causal_attention(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with a causal mask; query heads share KV heads in order. Returns [B, T, H, d]."""
    q, k, v = (t.transpose(1, 2) for t in (q_BTHd, k_BTKd, v_BTKd))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)
