"""Token losses, choices and divergences of several rungs on the same windows.

Weights are read block by block: memory is one block, the hidden states of CHUNK_TOKENS tokens per rung, and the logits
of one window per rung.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afq_export.arch import decoder
from afq_export.progress import Progress, silent
from afq_export.spec.report import Perplexity
from afq_export.validate.rungs import Rung, run_block

if TYPE_CHECKING:
    from afq_export.runtime.session import Session

CHUNK_TOKENS = 1 << 15
"""Tokens whose hidden states are held at a time; weights are read again for the next ones."""
BATCH_TOKENS = 1024
"""Tokens that one call of a block takes."""
SOFTMAX_TOKENS = 128
"""Tokens whose log-probabilities are held in float64 at a time."""

Logits = Callable[[int], Tensor]
"""Window index -> float logits [T, V]."""


LARGEST_NLL = 600.0
BROKEN = 1e300
"""The perplexity of a rung whose losses are not finite, or beyond all sense: finite, so that it can be reported."""


@dataclasses.dataclass(frozen=True)
class TokenStats:
    """One rung, teacher-forced: `nll` float64 [N, T-1] of the token that follows, `top1` int64 [N, T-1] its choice."""

    nll: Tensor
    top1: Tensor

    @property
    def perplexity(self) -> Perplexity:
        """exp(mean nll); the standard error by the delta method, `value * stderr of the mean`.

        Tokens of a window depend on each other, so the error of the mean is taken over the windows' means; with a
        single window over its tokens, which understates it.
        """
        nll = self.nll
        mean = float(nll.mean())
        value = math.exp(mean) if mean < LARGEST_NLL else BROKEN  # also for NaN
        means = nll.mean(dim=1) if len(nll) > 1 else nll[0]
        spread = float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else 0.0
        return Perplexity(value=value, stderr=value * spread if value < BROKEN else 0.0, tokens=nll.numel())


@dataclasses.dataclass(frozen=True)
class PairStats:
    """A rung against a reference, per predicted token [N, T-1].

    `same`: equal argmax. `equal`: all logits equal bit for bit. `kl`: KL(reference || rung) in nats, float64.
    `margin`: where the choices differ, the reference's logit of its own choice minus that of the rung's choice, over
    the reference's largest |logit|; else 0.
    """

    same: Tensor
    kl: Tensor
    margin: Tensor
    equal: Tensor


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Statistics by rung, and by (reference, rung)."""

    rungs: dict[str, TokenStats]
    pairs: dict[tuple[str, str], PairStats]


def measure(
    rungs: Mapping[str, Rung | Session],
    ids_NT: Tensor,
    pairs: Sequence[tuple[str, str]] = (),
    progress: Progress = silent,
) -> Measurement:
    """Runs every rung over all windows; `pairs` are (reference, rung) names to compare."""
    parts = [
        _measure_chunk(rungs, chunk, pairs, progress) for chunk in ids_NT.split(max(1, CHUNK_TOKENS // ids_NT.shape[1]))
    ]
    return Measurement(
        rungs={name: _join([part.rungs[name] for part in parts]) for name in rungs},
        pairs={pair: _join([part.pairs[pair] for part in parts]) for pair in pairs},
    )


def measure_one(rung: Rung | Session, ids_NT: Tensor, progress: Progress = silent) -> TokenStats:
    """The statistics of a single rung, for `perplexity` and `check`."""
    return measure({"model": rung}, ids_NT, progress=progress).rungs["model"]


def hidden_states(rung: Rung, ids_NT: Tensor, progress: Progress = silent, label: str = "blocks") -> Tensor:
    """What enters the final norm, [N, T, D]: all windows through one block, then the next."""
    x_NTD = rung.embed(ids_NT)
    batch = max(1, BATCH_TOKENS // ids_NT.shape[1])
    for index in range(rung.config.layers):
        progress(label, index, rung.config.layers)
        ops = rung.block(index)
        for start in range(0, len(x_NTD), batch):
            part = slice(start, start + batch)
            x_NTD[part] = run_block(rung, ops, x_NTD[part])
    progress(label, rung.config.layers, rung.config.layers)
    return x_NTD


@torch.no_grad()
def _measure_chunk(
    rungs: Mapping[str, Rung | Session], ids_NT: Tensor, pairs: Sequence[tuple[str, str]], progress: Progress
) -> Measurement:
    sources = {name: _logits(name, rung, ids_NT, progress) for name, rung in rungs.items()}
    stats: dict[str, list[TokenStats]] = {name: [] for name in rungs}
    compared: dict[tuple[str, str], list[PairStats]] = {pair: [] for pair in pairs}
    for index, ids_T in enumerate(ids_NT):
        progress("logits", index, len(ids_NT))
        logits = {name: source(index)[:-1] for name, source in sources.items()}
        for name, logits_TV in logits.items():
            stats[name].append(_token_stats(logits_TV, ids_T[1:]))
        for reference, rung_name in pairs:
            compared[reference, rung_name].append(_pair_stats(logits[reference], logits[rung_name]))
    progress("logits", len(ids_NT), len(ids_NT))
    return Measurement(
        rungs={name: _join(parts) for name, parts in stats.items()},
        pairs={pair: _join(parts) for pair, parts in compared.items()},
    )


def _logits(name: str, rung: Rung | Session, ids_NT: Tensor, progress: Progress) -> Logits:
    """Logits by window: of a runtime session, or of a rung's streamed hidden states."""
    if not hasattr(rung, "block"):
        return lambda index: rung.logits(ids_NT[index])
    hidden, head = hidden_states(rung, ids_NT, progress, f"{name}: blocks"), rung.head()
    return lambda index: decoder.head(head, hidden[index : index + 1])[0]


def _token_stats(logits_TV: Tensor, targets_T: Tensor) -> TokenStats:
    """One window as [1, T-1]."""
    nll = [
        -part.double().log_softmax(-1).gather(1, target[:, None])[:, 0]
        for part, target in zip(logits_TV.split(SOFTMAX_TOKENS), targets_T.split(SOFTMAX_TOKENS), strict=True)
    ]
    return TokenStats(nll=torch.cat(nll)[None], top1=logits_TV.argmax(-1)[None])


def _pair_stats(reference_TV: Tensor, rung_TV: Tensor) -> PairStats:
    """One window as [1, T-1]."""
    kl = [
        (p.exp() * (p - part.double().log_softmax(-1))).sum(-1)
        for p, part in (
            (reference.double().log_softmax(-1), part)
            for reference, part in zip(reference_TV.split(SOFTMAX_TOKENS), rung_TV.split(SOFTMAX_TOKENS), strict=True)
        )
    ]
    ours, theirs = reference_TV.argmax(-1, keepdim=True), rung_TV.argmax(-1, keepdim=True)
    gap_T1 = reference_TV.gather(1, ours) - reference_TV.gather(1, theirs)
    margin = (gap_T1 / reference_TV.abs().amax(-1, keepdim=True).clamp(min=1e-30))[:, 0].double()
    equal = (reference_TV == rung_TV).all(-1)
    return PairStats(same=(ours == theirs).T, kl=torch.cat(kl)[None], margin=margin[None], equal=equal[None])


def _join(parts):
    """Concatenates statistics along the windows."""
    fields = [field.name for field in dataclasses.fields(parts[0])]
    return type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})
