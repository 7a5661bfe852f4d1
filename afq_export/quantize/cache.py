"""Keys and values as a quantized KV cache holds them: the one definition that calibration learns against, both
reference rungs use, and the programs' own nodes are compared with.

Every group of a token's head (`KvCache.group` of its numbers, or all d) has a grid of its own, so that nothing is
calibrated. Float32 throughout, every operation rounded on its own:

    least = min x        step = max(max x - least, 2^-90) / n        n = 2^bits - 1
    code  = (x - least) / step, rounded half to even                 0 to n: nothing is to be clipped
    x'    = code * step + least                                      two roundings, never fused

The minimum is a float and not a zero point: at 4 bits it is worth a third of the damage, and keys whose projection has
a bias lie far from zero. d numbers take `row_bytes`: the codes, then every step, then every minimum.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.quantize.activations import LEAST_LARGEST, straight_through
from afq_export.spec.cache import Cache
from afq_export.spec.recipe import FLOAT_CACHE, KvCache
from afq_export.spec.target import TargetProfile

GRID_BYTES = 8
"""A group's step and minimum."""


@dataclasses.dataclass(frozen=True)
class CacheRows:
    """Rows on grids of their own: `x ~ codes * steps + least`.

    `codes` [..., G, g] are whole numbers held in float32, `steps` and `least` [..., G, 1] are float32.
    """

    codes: Tensor
    steps: Tensor
    least: Tensor

    def dequantized(self) -> Tensor:
        """Float32 [..., d]."""
        return (self.codes * self.steps + self.least).flatten(-2)

    def packed(self, bits: int) -> Tensor:
        """uint8 [..., row_bytes] as ONNX files hold them: codes, steps, minima.

        Codes of 4 bits lie two in a byte, those of the row's first half in the low bits.
        """
        codes = self.codes.flatten(-2).to(torch.uint8)
        if bits == 4:
            low, high = codes.chunk(2, dim=-1)
            codes = low | high << 4
        grids = torch.cat((self.steps, self.least), dim=-2).squeeze(-1).contiguous().view(torch.uint8)
        return torch.cat((codes, grids), dim=-1)


def quantize_cache(x: Tensor, cache: KvCache) -> CacheRows:
    """Keys or values float32 [..., d] on the grids of `cache`."""
    groups = x.unflatten(-1, (-1, cache.group or x.shape[-1]))
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    # A tensor, not a number: ExecuTorch divides by numbers as products with their reciprocal, which rounds twice.
    span = (most - least).clamp_min(LEAST_LARGEST)
    steps = span / torch.full_like(span, (1 << cache.bits) - 1)
    return CacheRows(((groups - least) / steps).round(), steps, least)


def cached(x: Tensor, cache: KvCache) -> Tensor:
    """Keys or values [..., d] as attention reads them back from the cache; the gradient is the identity."""
    if not cache.quantized:
        return x
    return straight_through(x, lambda v: quantize_cache(v.float(), cache).dequantized().to(v.dtype))


def row_bytes(cache: KvCache, head_dim: int) -> int:
    """Bytes of one head's key, or value, of one token."""
    if not cache.quantized:
        return 4 * head_dim
    return head_dim * cache.bits // 8 + GRID_BYTES * (head_dim // (cache.group or head_dim))


def row_size(cache: KvCache, head_dim: int) -> int:
    """Elements of the last dimension of a cache that is one tensor: numbers, or bytes where it is quantized."""
    return row_bytes(cache, head_dim) if cache.quantized else head_dim


def token_bytes(cache: KvCache, config: DecoderConfig) -> int:
    """Bytes that the cache takes for each token: keys and values of all heads of all blocks."""
    return 2 * config.layers * config.kv_heads * row_bytes(cache, config.head_dim)


def cache_facts(cache: KvCache, config: DecoderConfig, target: TargetProfile) -> Cache | None:
    """What reports and manifests say of the cache; None where the target's own runtime decides what it holds."""
    if target.kv_cache_bits == (FLOAT_CACHE.bits,):
        return None
    return Cache(cache.bits, cache.group, token_bytes(cache, config), token_bytes(FLOAT_CACHE, config))
