"""The baseline of `check`: what an exported file said of every token when it was accepted, and how it got there.

Fields may be added; a field that changes its meaning or goes away raises `SCHEMA_VERSION`.
"""

from __future__ import annotations

from afq_export.spec.report import Artifact, ManifestModel, Perplexity, Protocol
from afq_export.spec.strict import Data

SCHEMA_VERSION = 1


class Machine(Data):
    """Where something was measured: what the last bits and the speed of a runtime depend on."""

    architecture: str
    cpu: str
    flags: tuple[str, ...]
    threads: int


class Speed(Data):
    """Tokens per second: of one call with a whole prompt, and of one call per token."""

    prefill: float
    decode: float


class Facts(Data, kw_only=True):
    """What was measured, with what and where. `settings`: the options that the bundle gives its runtime, flat.

    `files`: the sha256 of every file of the bundle but its reports. `artifact`: the exported file, its size with the
    tensors beside it.
    """

    model: ManifestModel
    recipe: str
    target: str
    runtime: str
    artifact: Artifact
    files: dict[str, str]
    settings: dict[str, str]
    versions: dict[str, str]
    machine: Machine
    perplexity: Perplexity
    speed: Speed | None = None


class Drift(Data):
    """exp(mean paired difference of losses) - 1: the relative change of perplexity on the same tokens.

    `stderr` by the delta method from the windows' means; `low` and `high` bound it with 97.5 % each way (Student's t).
    """

    value: float
    stderr: float
    low: float
    high: float
    windows: int
    tokens: int


class Update(Data, kw_only=True):
    """One `baseline update`: who accepted what, why and when; the figures before, and what the change did to them.

    `cumulative`: drift since the first baseline. `top1`: share of tokens at which both choose the same; `kl` as `check`
    has it.
    """

    who: str
    what: str
    why: str
    date: str
    before: Facts
    drift: Drift
    cumulative: Drift
    top1: float
    kl: float


class Columns(Data):
    """Per predicted token, windows one after the other: little-endian arrays, n tokens, the K likeliest choices.

    `nll` float32 [n] nats. `top1` uint32 [n]. `digest` uint32 [n]: of all logits' bytes. `ids` uint32 [K, n]. `logs`
    uint16 [K + 1, n]: -log p of these, then of all others together, in steps of 1/2048 nat.
    """

    nll: bytes
    top1: bytes
    digest: bytes
    ids: bytes
    logs: bytes


class Baseline(Data, kw_only=True):
    """A baseline file. `first_nll` float32 [n]: the losses of the first baseline, None while this is the first."""

    schema_version: int = SCHEMA_VERSION
    created: str
    protocol: Protocol
    facts: Facts
    tokens: Columns
    first_nll: bytes | None = None
    updates: tuple[Update, ...] = ()
