"""A program under its runtime: token ids in, logits out."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Session(Protocol):
    """One loaded program. `context` is the most tokens a sequence has, `prefill` the most that one call takes.

    Not for use from several threads at once: the KV cache is state of the program.
    """

    @property
    def vocab(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def prefill(self) -> int: ...

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 [T, V] for a sequence int64 [T] that starts at position 0, cut into calls of `prefill` tokens.

        Raises InputError when T is 0 or more than `context`, or an id is outside the vocabulary.
        """

    def extend(self, ids: Tensor, position: int) -> Tensor:
        """Float32 [T, V] for tokens that follow the `position` tokens seen last. Raises InputError as `logits` does."""

    def generate(self, ids: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
        """The `tokens` most likely next ids, one after the other, without `ids`.

        Ends before the first id in `stop`, and where the context ends.
        """
