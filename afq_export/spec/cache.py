"""What reports and manifests say of a program's KV cache."""

from __future__ import annotations

from afq_export.spec.strict import Data


class Cache(Data):
    """`bits` of a number of a key or value (32: float) and, of codes, how many share a grid: `group`, 0 for all of a
    token's head. Bytes for every token, all blocks together; `float_token_bytes`: what they would be in float32."""

    bits: int
    group: int
    token_bytes: int
    float_token_bytes: int
