"""A decoder block in which every tensor has a name, for runtimes that keep every one of them on a stored grid.

`StaticOps` shows each result to `visit(name, x)` and goes on with what it returns: calibration observes there, fake
quantization rounds there, lowering notes the grid there. The names of a block's tensors, in the order in which they are
computed (Llama; q and k norms, which only some models have, in brackets):

    attn_norm  q_proj  k_proj  v_proj  [q_norm  k_norm]
    q_cos  q_sin  q_rotated  k_cos  k_sin  k_rotated       the two products of a rotation, and their sum
    keys  values                                           k_rotated and v_proj as the KV cache holds them
    q_scaled  scores  masked  probabilities  attended
    o_proj  attn_residual  mlp_norm  gate_proj  sigmoid  activation  up_proj  gated  down_proj  mlp_residual

Before the blocks stands `hidden`, after them `final_norm` and `lm_head`; `cos` and `sin` are inputs of every block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.ops import Ops

Visit = Callable[[str, Any], Any]
"""Name of a tensor and its value -> the value that is used from there on."""

INPUT_OF = {
    "q_proj": "attn_norm",
    "k_proj": "attn_norm",
    "v_proj": "attn_norm",
    "o_proj": "attended",
    "gate_proj": "mlp_norm",
    "up_proj": "mlp_norm",
    "down_proj": "gated",
    "fc1": "mlp_norm",
    "fc2": "activation",
    "lm_head": "final_norm",
}
"""Role of a linear -> the tensor that it takes."""

MASKED = -1e9
"""What is added to the score of a token that comes later; on every grid it becomes the lowest code."""


class Parts(Protocol):
    """What `StaticOps` needs besides `Ops`: on torch's tensors (`TorchParts`), or on values of a graph."""

    def tables(self, rope: Any) -> tuple[Any, Any]:
        """cos and sin for heads [B, T, H, d]; the first half of sin with its sign turned."""

    def turn(self, x: Any) -> Any:
        """The two halves of the last dimension, exchanged."""

    def scale(self, x: Any, factor: float) -> Any:
        """`x` times a number."""

    def sigmoid(self, x: Any) -> Any: ...

    def softmax(self, x: Any) -> Any:
        """Over the last dimension."""

    def permute(self, x: Any, axes: tuple[int, ...]) -> Any: ...

    def matmul(self, x: Any, y: Any) -> Any: ...

    def again(self, x: Any) -> Any:
        """`x`, to be put on another grid."""

    def remember(self, name: str, x: Any, axis: int) -> Any:
        """What the cache holds under `name`, followed along `axis` by `x`."""

    def mask(self, scores: Any) -> Any:
        """What is added to scores [B, H, T, total]."""


class TorchParts:
    """Whole sequences in torch: nothing is cached, every token sees those before it."""

    def tables(self, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos_Td, sin_Td = rope
        half = sin_Td.shape[-1] // 2
        return cos_Td[:, None, :], torch.cat((-sin_Td[:, :half], sin_Td[:, half:]), dim=-1)[:, None, :]

    def turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((second, first), dim=-1)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def sigmoid(self, x: Tensor) -> Tensor:
        return x.sigmoid()

    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def permute(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return x.permute(axes)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    def again(self, x: Tensor) -> Tensor:
        return x

    def remember(self, name: str, x: Tensor, axis: int) -> Tensor:
        return x

    def mask(self, scores: Tensor) -> Tensor:
        return scores.new_full(scores.shape[-2:], MASKED).triu(1)


class StaticOps:
    """`Ops` of one block (or of the head) on `inner`, which brings linears, norms and nonlinearities."""

    def __init__(self, config: DecoderConfig, inner: Ops, visit: Visit, parts: Parts | None = None) -> None:
        self.config, self.inner, self.visit, self.parts = config, inner, visit, parts or TorchParts()
        self._rotated = 0

    def linear(self, role: str, x: Any) -> Any:
        return self.visit(role, self.inner.linear(role, x))

    def norm(self, role: str, x: Any) -> Any:
        return self.visit(role, self.inner.norm(role, x))

    def add(self, name: str, x: Any, y: Any) -> Any:
        return self.visit(name, x + y)

    def multiply(self, name: str, x: Any, y: Any) -> Any:
        return self.visit(name, x * y)

    def hadamard(self, x: Any, size: int) -> Any:
        """Static graphs have none: it was refused before any work."""
        raise NotImplementedError

    def rotate(self, x: Any, rope: Any) -> Any:
        """Queries and keys take turns, as the families call it."""
        name = "qk"[self._rotated % 2]
        self._rotated += 1
        cos, sin = self.parts.tables(rope)
        along = self.visit(f"{name}_cos", x * self.visit("cos", cos))
        across = self.visit(f"{name}_sin", self.parts.turn(x) * self.visit("sin", sin))
        return self.visit(f"{name}_rotated", along + across)

    def activation(self, x: Any) -> Any:
        if self.config.activation != "silu":
            return self.visit("activation", self.inner.activation(x))
        return self.visit("activation", x * self.visit("sigmoid", self.parts.sigmoid(x)))

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        """Attention of q [B, T, H, d] over the cache and k, v [B, T, K, d]: [B, T, H, d].

        The query heads of a KV head lie side by side as rows, so that no key or value is repeated. The cache holds
        keys [B, K, d, total] and values [B, K, total, d].
        """
        parts, (batch, tokens, heads, width) = self.parts, q.shape
        kv_heads, rows = k.shape[2], heads // k.shape[2] * tokens
        k, v = self.visit("keys", parts.again(k)), self.visit("values", parts.again(v))
        keys = parts.remember("key", parts.permute(k, (0, 2, 3, 1)), 3)
        values = parts.remember("value", parts.permute(v, (0, 2, 1, 3)), 2)
        q = self.visit("q_scaled", parts.scale(q, 1 / math.sqrt(width)))
        q = parts.permute(q, (0, 2, 1, 3)).reshape(batch, kv_heads, rows, width)
        total = keys.shape[3]
        scores = self.visit("scores", parts.matmul(q, keys)).reshape(batch, heads, tokens, total)
        masked = self.visit("masked", scores + parts.mask(scores))
        probabilities = self.visit("probabilities", parts.softmax(masked)).reshape(batch, kv_heads, rows, total)
        attended = self.visit("attended", parts.matmul(probabilities, values))
        return parts.permute(attended.reshape(batch, heads, tokens, width), (0, 2, 1, 3))
