"""What `check` holds a bundle to, and what it says: `check --json` is a stable interface, as report.json is."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from afq_export.spec.baseline import Drift, Facts, Speed
from afq_export.spec.report import Perplexity, Protocol
from afq_export.spec.strict import Data

SCHEMA_VERSION = 1

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Limit = Annotated[float, msgspec.Meta(ge=0)]
"""`inf` switches a gate off."""
Identity = Literal["off", "same-machine", "always"]
Status = Literal["passed", "failed", "inconclusive", "skipped"]


class Limits(Data, kw_only=True):
    """The gates, as shares (0.005 is half a per cent).

    `drift`, `cumulative`: rise of perplexity over the baseline and over the first one. `top1`: least share of tokens
    with the baseline's choice. `kl`: nats a token. `size`: growth of the exported file. `slowdown`: loss of tokens per
    second, None: not measured. `identical`: whether all logits must be the baseline's to the last bit, and where.
    """

    drift: Limit = 0.005
    cumulative: Limit = 0.01
    top1: Share = 0.98
    kl: Limit = 1e-3
    size: Limit = 0.02
    slowdown: Limit | None = None
    identical: Identity = "off"


class Gate(Data):
    """One gate. Only `passed` and `skipped` let the verdict pass, and `skipped` says why in `detail`."""

    name: str
    status: Status
    detail: str


class Difference(Data):
    """A fact that is not the baseline's, None where it is absent: the first place to look for a cause."""

    name: str
    was: str | None
    now: str | None


class Departure(Data):
    """A predicted token whose loss rose: window and position in it, the text before it, it, and the two losses."""

    window: int
    position: int
    before: str
    token: str
    was: float
    now: float


class CheckReport(Data, kw_only=True):
    """`check --json`. `verdict`: `fail` when a gate failed, else `inconclusive` when one could not decide, else `pass`.

    `kl`: mean KL(baseline || now) in nats over the baseline's likeliest choices and one bucket for all others, which
    is never more than that over all. `identical`: share of tokens all of whose logits are the baseline's to the last
    bit; `first_other` is the first place that differs (window, place from 0). `worst`: where it departs most, one per
    window. Numbers are null where losses are no finite number.
    """

    schema_version: int = SCHEMA_VERSION
    verdict: Literal["pass", "fail", "inconclusive"]
    bundle: str
    baseline: str
    limits: Limits
    protocol: Protocol
    perplexity: Perplexity
    baseline_perplexity: Perplexity
    drift: Drift
    cumulative: Drift
    top1: float
    kl: float
    identical: float
    first_other: tuple[int, int] | None
    speed: Speed | None
    gates: tuple[Gate, ...]
    differences: tuple[Difference, ...]
    worst: tuple[Departure, ...]
    facts: Facts
    device: str = ""
    """Where it was measured, empty for this machine."""
