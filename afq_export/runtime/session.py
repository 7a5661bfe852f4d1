"""A program under its runtime: token ids in, logits out."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from afq_export.errors import InputError


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


def check_ids(session: Session, path: Path, ids: Tensor, position: int) -> None:
    """Raises InputError unless `session`, of the program at `path`, takes ids [T] after `position` tokens."""
    if ids.ndim != 1 or not len(ids):
        raise InputError("token ids must be one sequence", why=f"shape {tuple(ids.shape)}")
    if position < 0 or position + len(ids) > session.context:
        raise InputError(
            "the sequence is longer than the program's context",
            where=str(path),
            why=f"{position + len(ids)} tokens, context {session.context}",
            do="shorten the text or lower with a larger context",
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= session.vocab:
        raise InputError("a token id is outside the vocabulary", why=f"ids {low}..{high}, vocabulary {session.vocab}")


def greedy(session: Session, ids: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
    """`Session.generate`: a prompt in one go, then token by token."""
    position = len(ids)
    generated: list[int] = []
    row = session.logits(ids)[-1]
    while len(generated) < tokens:
        best = int(row.argmax())
        if best in stop:
            break
        generated.append(best)
        if len(generated) == tokens or position == session.context:
            break
        row = session.extend(torch.tensor([best]), position)[-1]
        position += 1
    return generated
