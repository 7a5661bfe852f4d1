"""Attention in bfloat16 where torch's own is slow: on a processor, while something is learned.

torch's fused kernel takes as long in bfloat16 as in float32 there (2.13: 116 ms forth and back for 2048 tokens of 9
heads of 64, both), plain products take half of that. Queries go in parts, so that each is multiplied with the keys that
it may see and little more, and the heads that share a key go in one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128
"""Queries of a part: a smaller one sees fewer masked keys, a larger one makes larger products."""


def attention_in_parts(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, dtype: torch.dtype) -> Tensor:
    """`causal_attention` [B, T, H, d] with products in `dtype`, of heads that share KV heads in order."""
    batch, tokens, heads, d = q_BTHd.shape
    shared = k_BTKd.shape[2]
    q = (q_BTHd * d**-0.5).to(dtype).view(batch, tokens, shared, heads // shared, d).permute(0, 2, 3, 1, 4)
    k, v = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (k_BTKd, v_BTKd))
    parts = []
    for start in range(0, tokens, ROWS):
        end = min(start + ROWS, tokens)
        rows = q[..., start:end, :].flatten(0, 1)
        scores = (rows.flatten(1, 2) @ k[:, :end].mT).view(*rows.shape[:3], end)
        later = scores.new_full((end - start, end), -torch.inf).triu_(1 + start)
        weights = scores.add_(later).softmax(-1)
        parts.append((weights.flatten(1, 2) @ v[:, :end]).view(rows.shape))
    return torch.cat(parts, dim=2).view(batch, heads, tokens, d).transpose(1, 2)
