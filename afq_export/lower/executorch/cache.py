"""The quantized KV cache in an ExecuTorch program: codes and grids as mutable buffers, read back before attention.

    codes   uint8 [1, context, K, d], or d / 2 with two codes of 4 bits in a byte: the first half's in the low bits
    grids   float32 [1, context, K, 2 G]: every step, then every minimum

`quantize/cache.py` defines the numbers; here it is traced. The runtime's custom attention takes floats only, so what is
in the cache up to the last token of the call becomes floats for as long as one block's attention runs. (Its
`custom_quantized_sdpa` quantizes queries and probabilities as well, which is another model.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afq_export.quantize.cache import CacheRows, quantize_cache
from afq_export.spec.recipe import KvCache


class QuantizedRows(nn.Module):
    """Keys or values of one block."""

    def __init__(self, kv_heads: int, head_dim: int, context: int, cache: KvCache) -> None:
        super().__init__()
        self.cache, self.groups = cache, head_dim // (cache.group or head_dim)
        shape = (1, context, kv_heads)
        self.register_buffer("codes", torch.zeros((*shape, head_dim * cache.bits // 8), dtype=torch.uint8))
        self.register_buffer("grids", torch.zeros((*shape, 2 * self.groups)))

    def forward(self, x: Tensor, start: int) -> Tensor:
        """All keys up to the last of `x` [1, T, K, d], whose first token stands at `start`: float32 [1, end, K, d]."""
        rows = quantize_cache(x, self.cache)
        codes = rows.codes.flatten(-2)
        if self.cache.bits == 4:
            low, high = codes.chunk(2, dim=-1)
            codes = low + high * 16.0
        torch.ops.llama.update_cache(codes.to(torch.uint8), self.codes, start)
        torch.ops.llama.update_cache(torch.cat((rows.steps, rows.least), dim=-2).flatten(-2), self.grids, start)
        end = start + x.shape[1]
        return self._read(self.codes.narrow(1, 0, end), self.grids.narrow(1, 0, end))

    def _read(self, codes: Tensor, grids: Tensor) -> Tensor:
        if self.cache.bits == 4:
            halves = torch.bitwise_and(codes, 15), torch.bitwise_right_shift(codes, 4)
            codes = torch.cat(halves, dim=-1)
        steps, least = grids.unsqueeze(-1).chunk(2, dim=-2)
        return CacheRows(codes.float().unflatten(-1, (self.groups, -1)), steps, least).dequantized()


class QuantizedAttention(nn.Module):
    """One block's quantized KV cache, and causal attention over everything in it."""

    def __init__(self, kv_heads: int, head_dim: int, context: int, cache: KvCache) -> None:
        super().__init__()
        self.keys, self.values = (QuantizedRows(kv_heads, head_dim, context, cache) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """[1, T, H, d] for q [1, T, H, d], k and v [1, T, K, d] of the tokens at `start` and after."""
        return torch.ops.llama.custom_sdpa(q, self.keys(k, start), self.values(v, start), start, None, 0.0, True)
