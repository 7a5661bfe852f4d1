"""A session that keeps what a baseline needs of the logits that pass through it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from afq_export.errors import InputError
from afq_export.guard.tokens import KEPT, Tokens, steps
from afq_export.progress import Progress
from afq_export.runtime.session import Session
from afq_export.validate.evaluate import SOFTMAX_TOKENS, TokenStats, measure_one

LEAST = 1e-15
"""What is left for all other tokens at least: below, float64 has no digits of it."""


class Recorder:
    """`Session` for measuring: every call of `logits` is one window, in order.

    `reference`: Tokens of the same windows, whose choices are looked up in these logits too.
    """

    def __init__(self, session: Session, reference: Tokens | None = None) -> None:
        if reference is not None and reference.ids.size and int(reference.ids.max()) >= session.vocab:
            raise InputError(
                "the baseline is of another vocabulary",
                why=f"it holds token {int(reference.ids.max())}, the program has {session.vocab}",
                do="make a new baseline",
            )
        self._session, self._reference = session, reference
        self._digest: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []
        self._logs: list[np.ndarray] = []
        self._there: list[np.ndarray] = []

    def logits(self, ids: Tensor) -> Tensor:
        """The session's, float32 [T, V]; the last row predicts nothing here and is not kept."""
        logits_TV = self._session.logits(ids)
        predicting = logits_TV[:-1]
        sums = _log_sums(predicting)
        chosen = predicting.topk(min(KEPT, self._session.vocab - 1), dim=-1).indices
        if self._reference is not None:
            there = torch.from_numpy(self._reference.ids[len(self._digest)].astype(np.int64))
            self._there.append(steps(_bucket_logs(predicting, sums, there)))
        self._digest.append(_digests(predicting))
        self._ids.append(chosen.numpy().astype(np.uint32))
        self._logs.append(steps(_bucket_logs(predicting, sums, chosen)))
        return logits_TV

    def tokens(self, stats: TokenStats) -> Tokens:
        """What was kept, with the losses and choices that were computed from it."""
        return Tokens(
            nll=stats.nll.numpy().astype(np.float32),
            top1=stats.top1.numpy().astype(np.uint32),
            digest=np.stack(self._digest),
            ids=np.stack(self._ids),
            logs=np.stack(self._logs),
        )

    def at_reference(self) -> np.ndarray:
        """These logits' log-probabilities of the reference's choices, as `Tokens.logs` has them."""
        return np.stack(self._there)


def record(
    session: Session, ids_NT: Tensor, progress: Progress, reference: Tokens | None = None
) -> tuple[TokenStats, Tokens, np.ndarray | None]:
    """The losses of `session` as `perplexity` measures them, what a baseline holds of them, and (with a reference) the
    log-probabilities of its choices."""
    recorder = Recorder(session, reference)
    stats = measure_one(recorder, ids_NT, progress)  # type: ignore[arg-type]
    return stats, recorder.tokens(stats), None if reference is None else recorder.at_reference()


def _digests(logits_TV: Tensor) -> np.ndarray:
    """32 bits of BLAKE2 of every row's bytes, uint32 [T]."""
    rows = (hashlib.blake2b(row, digest_size=4).digest() for row in np.ascontiguousarray(logits_TV.numpy()))
    return np.frombuffer(b"".join(rows), "<u4")


def _log_sums(logits_TV: Tensor) -> Tensor:
    """log of the sum of exp over every row, float64 [T, 1]."""
    return torch.cat([part.double().logsumexp(-1, keepdim=True) for part in logits_TV.split(SOFTMAX_TOKENS)])


def _bucket_logs(logits_TV: Tensor, sums_T1: Tensor, ids_TK: Tensor) -> np.ndarray:
    """Log-probabilities of K tokens of each row, and of all others together: float64 [T, K + 1]."""
    chosen = logits_TV.gather(1, ids_TK).double() - sums_T1
    rest = (1 - chosen.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
    return torch.cat([chosen, rest], dim=1).numpy()
