"""Two measurements of the same tokens, compared token by token. Pure functions of arrays.

Pairing is what makes small drifts visible: how hard a text is cancels, only what the change did to each token is left.
Tokens of a window depend on each other, so a window's mean is one observation, and the error of the mean is Student's
over windows. A decision errs with at most 2.5 % each way: it calls a drift at the limit a failure, or a pass, in no
more than one of forty cases.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Literal

import numpy as np

from afq_export.guard.student import quantile
from afq_export.guard.tokens import Tokens, nats
from afq_export.spec.baseline import Drift

CONFIDENCE = 0.975
"""Each way."""
POWER = 0.8
"""Chance of a decision that `windows_needed` provides for."""
MOST_WINDOWS = 10**9
LEAST_RISE = 1e-4
"""Nats by which a loss must rise for its token to be named."""
LARGEST = 600.0
"""Nats beyond which a drift is infinite."""


@dataclasses.dataclass(frozen=True)
class Paired:
    """Differences of losses, now minus before: `mean` nats a token, `spread` the standard deviation of window means."""

    mean: float
    spread: float
    windows: int
    tokens: int

    @property
    def stderr(self) -> float:
        """Of the mean, nats."""
        return self.spread / math.sqrt(self.windows)

    @property
    def drift(self) -> Drift:
        """The relative change of perplexity."""
        reach = quantile(CONFIDENCE, self.windows - 1) * self.stderr
        value, low, high = (_expm1(self.mean + side * reach) for side in (0, -1, 1))
        return Drift(value, (1 + value) * self.stderr, low, high, self.windows, self.tokens)

    def against(self, limit: float) -> Literal["passed", "failed", "inconclusive"]:
        """Passed when a rise to `limit` is excluded, failed when one beyond it is certain, CONFIDENCE each way."""
        drift = self.drift
        if drift.high < limit or self.mean == self.spread == 0:
            return "passed"
        return "failed" if drift.low > limit else "inconclusive"

    def windows_needed(self, limit: float) -> int | None:
        """Windows with which this mean and spread would be told from `limit`, four times in five; None: never."""
        gap = abs(math.log1p(limit) - self.mean)
        if not gap > 0:
            return None
        most = 2
        while not self._tells(most, gap):
            most *= 2
            if most > MOST_WINDOWS:
                return None
        return bisect.bisect_left(range(most), True, lo=2, key=lambda windows: self._tells(windows, gap))

    def _tells(self, windows: int, gap: float) -> bool:
        """Whether an error of the mean over `windows` is small enough to see `gap` nats."""
        reach = quantile(CONFIDENCE, windows - 1) + quantile(POWER, windows - 1)
        return reach * self.spread <= gap * math.sqrt(windows)


def paired(now: np.ndarray, before: np.ndarray) -> Paired:
    """Losses [N, P] against losses [N, P], N at least 2. The mean is infinite when a loss of `now` is not finite."""
    if not np.isfinite(now).all():
        return Paired(math.inf, 0.0, len(now), now.size)
    difference = now.astype(np.float64) - before.astype(np.float64)
    means = difference.mean(axis=1)
    return Paired(float(means.mean()), float(means.std(ddof=1)), len(means), difference.size)


def agreement(now: Tokens, before: Tokens) -> float:
    """Share of tokens at which both choose the same."""
    return float((now.top1 == before.top1).mean())


def divergence(before: np.ndarray, now: np.ndarray, same: np.ndarray) -> np.ndarray:
    """KL(before || now) in nats, float64 [N, P], over the buckets of the last axis of two arrays of stored steps.

    Merging outcomes into buckets never enlarges a divergence (data-processing inequality), so this is a lower bound of
    that over the whole vocabulary, up to the rounding of the storage (2.4e-4 of a nat per bucket). `same` [N, P]: where
    all logits are equal, where it is 0.
    """
    p, q = nats(before), nats(now)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    return np.where(same, 0.0, np.maximum(kl, 0.0))


def first_other(same: np.ndarray) -> tuple[int, int] | None:
    """Window and place of the first token whose logits are not equal, None when all are."""
    if same.all():
        return None
    window, place = divmod(int(np.argmin(same)), same.shape[1])
    return window, place


def worst_places(now: np.ndarray, before: np.ndarray, most: int) -> list[tuple[int, int]]:
    """(window, place) of the largest rise of loss in each of the `most` windows whose mean loss rose most."""
    rise = np.nan_to_num(now.astype(np.float64) - before, nan=np.inf)
    order = np.argsort(-rise.mean(axis=1), kind="stable")[:most]
    return [(int(window), int(rise[window].argmax())) for window in order if rise[window].max() > LEAST_RISE]


def _expm1(value: float) -> float:
    return math.expm1(value) if value < LARGEST else math.inf
