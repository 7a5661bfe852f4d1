"""Paired statistics: identities, bounds, and by simulation how often the decision errs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.guard.compare import agreement, divergence, first_other, paired, worst_places
from afq_export.guard.gates import drift_gate
from afq_export.guard.tokens import KEPT, nats, steps
from tests.guard.sample import of_logits, protocol, tokens

LIMIT = 0.005
REPEATS = 2000


def losses(random: np.random.Generator, windows: int, drift: float, predicted: int = 63) -> tuple[np.ndarray, ...]:
    """Losses before and now [N, P]: hard and easy tokens, hard and easy windows, and a change that both have a part in.

    The mean change is log(1 + drift) exactly in expectation; tokens of a window share a part of it.
    """
    before = random.gamma(1.5, 2.0, (windows, predicted)) * random.uniform(0.7, 1.3, (windows, 1))
    shared = random.normal(0, 0.004, (windows, 1))
    own = random.normal(0, 0.03, (windows, predicted))
    return before, before + math.log1p(drift) + shared + own


def statuses(windows: int, drift: float, seed: int = 0) -> dict[str, float]:
    """How often the gate says what, over REPEATS."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(REPEATS):
        before, now = losses(random, windows, drift)
        found.append(paired(now, before).against(LIMIT))
    return {status: found.count(status) / REPEATS for status in ("passed", "failed", "inconclusive")}


@pytest.mark.parametrize("windows", [2, 4, 12, 40])
def test_at_the_limit_the_decision_errs_in_one_of_forty_cases_each_way(windows: int) -> None:
    """2.5 %, and three standard errors of the count."""
    found = statuses(windows, LIMIT)
    most = 0.025 + 3 * math.sqrt(0.025 * 0.975 / REPEATS)
    assert found["passed"] < most and found["failed"] < most
    assert found["inconclusive"] > 0.9


def test_with_the_normal_quantile_and_with_tokens_for_windows_it_would_err_more_often() -> None:
    """What Student's t and the windows are there for: both short cuts err twice as often as they say."""
    random = np.random.default_rng(1)
    normal, by_token = 0, 0
    for _ in range(REPEATS):
        before, now = losses(random, 4, LIMIT)
        pair = paired(now, before)
        above = pair.mean - math.log1p(LIMIT)
        normal += above > 1.96 * pair.stderr
        by_token += above > 1.96 * (now - before).std() / math.sqrt(now.size)
    assert normal / REPEATS > 0.05 and by_token / REPEATS > 0.05


def test_power() -> None:
    """No drift passes and twice the limit fails, almost always; a drift beside the limit is left open."""
    assert statuses(20, 0.0)["passed"] > 0.9 and statuses(20, 2 * LIMIT)["failed"] > 0.9
    assert statuses(40, 0.0)["passed"] > 0.999 and statuses(40, 0.0)["failed"] == 0
    assert statuses(12, 0.0045)["inconclusive"] > 0.8


@pytest.mark.parametrize("drift", [0.0, 0.008])
def test_as_many_windows_as_asked_for_decide_in_four_of_five_cases(drift: float) -> None:
    """Asked with the true mean and spread, which an answer in practice only estimates."""
    random = np.random.default_rng(2)
    before, now = losses(random, 20000, drift)
    pair = paired(now, before)
    needed = pair.windows_needed(LIMIT)
    assert needed is not None
    found = statuses(needed, drift, seed=3)
    assert found["passed" if drift < LIMIT else "failed"] == pytest.approx(0.8, abs=0.06)
    assert pair.windows_needed(math.expm1(pair.mean)) is None


def test_pairing_is_far_tighter() -> None:
    """Ten times at least, on losses that are as uneven as a model's."""
    before, now = losses(np.random.default_rng(4), 40, 0.001)
    apart = math.hypot(*(x.mean(axis=1).std(ddof=1) / math.sqrt(40) for x in (before, now)))
    assert apart / paired(now, before).stderr > 10


def test_equal_losses() -> None:
    found = paired(tokens().nll, tokens().nll)
    assert (found.mean, found.stderr, found.drift.value, found.drift.low, found.drift.high) == (0, 0, 0, 0, 0)
    assert drift_gate("drift", found, 0.0, protocol()).status == "passed"


def test_a_known_drift() -> None:
    """Every loss log(1.01) larger: 1 % more perplexity, no error."""
    before = tokens().nll.astype(np.float64)
    drift = paired(before + math.log(1.01), before).drift
    assert drift.value == pytest.approx(0.01, rel=1e-9) and drift.stderr < 1e-12 and drift.tokens == before.size


def test_losses_that_are_no_numbers() -> None:
    now = tokens().nll.copy()
    now[1, 2] = np.nan
    found = paired(now, tokens().nll)
    gate = drift_gate("drift", found, math.inf, protocol(), broken=1)
    assert found.drift.value == math.inf
    assert (gate.status, gate.detail) == ("failed", "1 of 186 losses are no finite number")


def whole_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL over everything, of logits."""
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), noise=st.floats(0.05, 3.0), sharpness=st.floats(0.5, 6.0))
def test_the_stored_divergence_never_exceeds_the_whole_one(seed: int, noise: float, sharpness: float) -> None:
    """But for the rounding of what is stored, and it is most of it where the kept choices are."""
    random = np.random.default_rng(seed)
    p = random.normal(size=(2, 5, 40)) * sharpness
    q = p + random.normal(size=p.shape) * noise
    before = of_logits(p, np.zeros((2, 5), int))
    logs = q - np.log(np.exp(q).sum(-1, keepdims=True))
    there = np.take_along_axis(logs, before.ids.astype(int), -1)
    there = steps(np.concatenate([there, np.log1p(-np.exp(there).sum(-1, keepdims=True))], -1))
    found, whole = divergence(before.logs, there, np.zeros((2, 5), bool)), whole_kl(p, q)
    assert (found >= 0).all() and (found <= whole * 1.01 + 5e-4).all()
    if sharpness > 4:
        assert found.sum() > 0.5 * whole.sum()


def test_equal_logits_have_no_divergence_whatever_was_rounded() -> None:
    first = tokens()
    assert (divergence(first.logs, first.logs, np.ones(first.nll.shape, bool)) == 0).all()
    assert (divergence(first.logs, first.logs, np.zeros(first.nll.shape, bool)) == 0).all()


def test_storage_of_probabilities() -> None:
    """Half a step at most; what is impossible or no number is the least that there is; sums are one again."""
    logs = -np.array([[0.0, 1.0, 31.99, 40.0, np.inf, np.nan]])
    assert steps(logs).tolist() == [[0, 2048, 65516, 65535, 65535, 65535]]
    kept = tokens().logs
    assert kept.shape[-1] == KEPT + 1
    assert np.exp(nats(kept)).sum(-1) == pytest.approx(1.0, abs=1e-12)


def test_agreement_and_places() -> None:
    first, second = tokens(), tokens()
    second.top1[0, :3] += 1
    assert agreement(first, second) == 1 - 3 / first.nll.size
    same = np.ones((3, 4), bool)
    assert first_other(same) is None
    same[1, 2] = same[2, 0] = False
    assert first_other(same) == (1, 2)
    before = np.zeros((4, 5))
    now = before.copy()
    now[2, 3], now[1, 1], now[3] = 5.0, 1.0, -1.0
    assert worst_places(now, before, 3) == [(2, 3), (1, 1)]
