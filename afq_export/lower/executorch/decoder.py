"""The outer module of an exported decoder: embedding, KV cache and attention around the delegates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afq_export.arch.attention import rope_tables
from afq_export.arch.decoder import family
from afq_export.lower.executorch.cache import QuantizedAttention
from afq_export.lower.executorch.compose import call_segment
from afq_export.lower.executorch.segments import Segment
from afq_export.lower.executorch.weights import pack_embedding_int2, pack_embedding_int4
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedEmbedding


class CachedDecoder(nn.Module):
    """`forward(tokens int64 [1, T], input_pos int64 [1])` to logits float32 [1, T, V].

    The caches [1, context, K, d], float or quantized (cache.py), are state of the program. Positions from `input_pos`
    on are overwritten, and only positions before the end of this call are attended to, so a call at position 0 starts
    afresh.
    """

    def __init__(self, checkpoint: QuantizedCheckpoint, segments: Sequence[Segment], context: int) -> None:
        super().__init__()
        self.config, self.segments, self.context = checkpoint.config, segments, context
        self.rows = TokenRows(checkpoint.embedding())
        positions = checkpoint.embedding_floats().get("embed_positions.weight")
        self.register_buffer("positions", None if positions is None else positions.float())
        if self.config.rope:
            cos_Sd, sin_Sd = rope_tables(self.config.rope, torch.arange(context))
            self.register_buffer("cos", cos_Sd)
            self.register_buffer("sin", sin_Sd)
        sizes, cache = (self.config.kv_heads, self.config.head_dim, context), checkpoint.kv_cache
        self.attention = nn.ModuleList(
            QuantizedAttention(*sizes, cache) if cache.quantized else CachedAttention(*sizes)
            for _ in range(self.config.layers)
        )

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        count = tokens.shape[1]
        start = input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start < self.context)
        torch._check(start + count <= self.context)
        rotation = []
        if self.config.rope:
            rotation = [table.narrow(0, start, count) for table in (self.cos, self.sin)]

        x = self._embed(tokens, input_pos)
        first, *middle, last = self.segments
        q, k, v = call_segment(first, [x, *rotation])
        for index, segment in enumerate(middle):
            attended = self.attention[index](q, k, v, start)
            x, q, k, v = call_segment(segment, [x, attended, *rotation])
        attended = self.attention[-1](q, k, v, start)
        return call_segment(last, [x, attended])[0]

    def _embed(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        weights = {} if self.positions is None else {"embed_positions.weight": self.positions}
        positions = input_pos + torch.arange(tokens.shape[1])
        return family(self.config).embed(self.config, self.rows(tokens), weights, positions)


class CachedAttention(nn.Module):
    """One block's KV cache, float32 [1, context, K, d], and causal attention over everything in it."""

    def __init__(self, kv_heads: int, head_dim: int, context: int) -> None:
        super().__init__()
        shape = (1, context, kv_heads, head_dim)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """[1, T, H, d] for q [1, T, H, d], k and v [1, T, K, d] of the tokens at `start` and after."""
        torch.ops.llama.update_cache(k, self.keys, start)
        torch.ops.llama.update_cache(v, self.values, start)
        return torch.ops.llama.custom_sdpa(q, self.keys, self.values, start, None, 0.0, True)


class TokenRows(nn.Module):
    """Token ids [1, T] to float32 rows [1, T, D], from int2, int4, int8 or float storage."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self.bits = embedding.bits
        codes = embedding.codes.numpy()
        match self.bits:
            case 2:
                codes = pack_embedding_int2(codes)
            case 4:
                codes = pack_embedding_int4(codes)
            case 8:
                pass
            case _:
                codes = codes.astype("float32")
        self.register_buffer("codes", torch.from_numpy(codes))
        self.register_buffer("scales", None if embedding.scales is None else embedding.scales.float())

    def forward(self, tokens: Tensor) -> Tensor:
        quantized = torch.ops.quantized_decomposed
        match self.bits:
            case 2:
                look_up, low, high = quantized.embedding_2bit.dtype, -2, 1
            case 4:
                look_up, low, high = quantized.embedding_4bit.dtype, -8, 7
            case 8:
                look_up, low, high = quantized.embedding_byte.dtype, -128, 127
            case _:
                return F.embedding(tokens, self.codes)
        return look_up(self.codes, self.scales, None, low, high, tokens, dtype=torch.float32)
