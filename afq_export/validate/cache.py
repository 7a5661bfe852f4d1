"""What the runtime really holds in a quantized KV cache: bytes counted, and compared with the reference's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from afq_export.arch.decoder import run_block
from afq_export.quantize.cache import quantize_cache, token_bytes
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec.recipe import FLOAT_CACHE
from afq_export.spec.report import Check
from afq_export.validate.rungs import QuantizedRung

NAME = "kv cache"
Caches = list[tuple[np.ndarray, np.ndarray]]
"""Keys and values of every block, uint8 [K, T, R]."""


@torch.no_grad()
def expected_caches(rung: QuantizedRung, ids_T: Tensor) -> Caches:
    """What the cache holds after the tokens `ids_T`, by the reference's own arithmetic."""
    cache, found = rung.checkpoint.kv_cache, []

    def attend(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        keys, values = (quantize_cache(x[0], cache).packed(cache.bits).transpose(0, 1) for x in (k_BTKd, v_BTKd))
        found.append((keys.numpy(), values.numpy()))
        return rung.attend(q_BTHd, k_BTKd, v_BTKd)

    x = rung.embed(ids_T[None])
    for index in range(rung.config.layers):
        x = run_block(rung.config, rung.block(index), x, attend)
    return found


def cache_check(outputs: Mapping[str, np.ndarray], rung: QuantizedRung, ids_T: Tensor) -> Check:
    """`outputs`: the runtime's `present.<i>.key` and `.value` [1, K, T, R] after the tokens `ids_T` in one call."""
    named = [(f"present.{i}.key", f"present.{i}.value") for i in range(rung.config.layers)]
    held = sum(outputs[name].nbytes for names in named for name in names)
    same = total = 0
    for names, rows in zip(named, expected_caches(rung, ids_T), strict=True):
        for name, row in zip(names, rows, strict=True):
            same, total = same + int((outputs[name][0] == row).sum()), total + row.size
    checkpoint = rung.checkpoint
    return verdict_on(checkpoint, held, len(ids_T), f"{same:,} of {total:,} bytes are the reference's", same == total)


def verdict_on(checkpoint: QuantizedCheckpoint, held: int, tokens: int, detail: str, passed: bool) -> Check:
    """Passed only when the runtime also held no more bytes than the grid has."""
    promised = tokens * token_bytes(checkpoint.kv_cache, checkpoint.config)
    floats = tokens * token_bytes(FLOAT_CACHE, checkpoint.config)
    size = f"{held:,} bytes held for {tokens} tokens, {held / floats:.1%} of a float cache's"
    status = "passed" if passed and held == promised else "failed"
    return Check(name=NAME, status=status, detail=f"{size}; {detail}")
