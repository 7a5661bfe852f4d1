"""Limits, and what came out, as gates. Pure functions of numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from afq_export.guard.compare import Paired
from afq_export.guard.facts import changed_settings, same_arithmetic, same_speed
from afq_export.spec.baseline import Facts, Speed
from afq_export.spec.guard import Gate, Limits
from afq_export.spec.report import Protocol

NO_CLAIM = "not measured: emulated, no speed claim"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What came out of a bundle beside its baseline. `broken`: losses that are no finite number."""

    drift: Paired
    cumulative: Paired
    top1: float
    kl: float
    identical: float
    first_other: tuple[int, int] | None
    broken: int
    before: Facts
    now: Facts


def all_gates(found: Comparison, limits: Limits, protocol: Protocol) -> tuple[Gate, ...]:
    """Every gate, those on accuracy first."""
    return (
        drift_gate("drift", found.drift, limits.drift, protocol, found.broken),
        drift_gate("cumulative drift", found.cumulative, limits.cumulative, protocol, found.broken),
        _plain("top-1", found.top1 >= limits.top1, f"the baseline's choice at {found.top1:.3%} of tokens, floor "
               f"{limits.top1:.2%}"),
        _plain("KL", found.kl <= limits.kl, f"at least {found.kl:.2e} nats a token, limit {limits.kl:.2e}"),
        _size(found, limits.size),
        *_settings(found),
        *_identity(found, limits),
        *_speed(found, limits.slowdown),
    )  # fmt: skip


def drift_gate(name: str, drift: Paired, limit: float, protocol: Protocol, broken: int = 0) -> Gate:
    """`Paired.against` with its figures; where it is left open, with how many tokens would decide."""
    if broken:
        return Gate(name, "failed", f"{broken} of {drift.tokens} losses are no finite number")
    at, status = drift.drift, drift.against(limit)
    figures = f"{percent(at.value)} ± {percent(at.stderr, '')}, limit {percent(limit)}"
    return Gate(
        name, status, f"{figures}: {_more_tokens(drift, limit, protocol)}" if status == "inconclusive" else figures
    )


def verdict(gates: tuple[Gate, ...]) -> Literal["pass", "fail", "inconclusive"]:
    """`pass` only when every gate passed or says why it was skipped."""
    found = {gate.status for gate in gates}
    return "fail" if "failed" in found else "inconclusive" if "inconclusive" in found else "pass"


def percent(value: float, sign: str = "+") -> str:
    """A share in per cent with enough digits to see it: `+0.031%`, `+2.40%`, `+1.2e-05%`."""
    share = 100 * value
    form = ".2f" if abs(share) >= 1 or share == 0 else ".3f" if abs(share) >= 0.001 else ".1e"
    return f"{share:{sign}{form}}%"


def _more_tokens(drift: Paired, limit: float, protocol: Protocol) -> str:
    """How many tokens would decide, in words."""
    windows = drift.windows_needed(limit)
    if windows is None:
        return "not enough tokens, and no number of them tells such a drift from its limit"
    tokens = windows * (drift.tokens // drift.windows)
    where = f"a baseline of {windows} windows (--windows)" if windows <= protocol.windows_in_corpus else (
        f"a text with {windows} windows, this one has {protocol.windows_in_corpus}"
    )  # fmt: skip
    return f"not enough tokens ({drift.tokens}), need about {tokens}: {where}"


def _plain(name: str, good: bool, detail: str) -> Gate:
    return Gate(name, "passed" if good else "failed", detail)


def _size(found: Comparison, limit: float) -> Gate:
    before, now = found.before.artifact.bytes, found.now.artifact.bytes
    growth = now / before - 1 if before else math.inf
    return _plain("size", growth <= limit, f"{now} bytes, were {before}: {percent(growth)}, limit {percent(limit)}")


def _settings(found: Comparison) -> Iterator[Gate]:
    """Whether the runtime is given the same options; nothing where it takes none from a bundle."""
    if found.before.settings or found.now.settings:
        changed = changed_settings(found.before, found.now)
        listed = "; ".join(f"{d.name} was {d.was or 'not set'}, is {d.now or 'not set'}" for d in changed)
        yield _plain("runtime options", not changed, listed or f"{len(found.now.settings)} as in the baseline")


def _identity(found: Comparison, limits: Limits) -> Iterator[Gate]:
    """All logits to the last bit, where it is asked for; the same file on the same machine must give them anyhow."""
    other = same_arithmetic(found.before, found.now)
    same_file = _same_program(found.before, found.now)
    if limits.identical == "off" and (other or not same_file):
        return
    share = bits(found.identical, found.first_other)
    if found.first_other is None:
        yield Gate("identical", "passed", share)
    elif other and limits.identical != "always":
        yield Gate("identical", "skipped", f"{share}; not promised here: {other}")
    else:
        yield Gate("identical", "failed", share + ("; the same file on the same machine" if same_file else ""))


def bits(identical: float, first: tuple[int, int] | None) -> str:
    """How much is equal to the last bit, in words."""
    place = "" if first is None else f", first other at window {first[0]}, token {first[1] + 1}"
    return f"all logits equal at {identical:.3%} of tokens{place}"


def _same_program(before: Facts, now: Facts) -> bool:
    return before.artifact == now.artifact and before.settings == now.settings


def _speed(found: Comparison, limit: float | None) -> Iterator[Gate]:
    """Nothing when not asked for; skipped when there is nothing to compare with."""
    if limit is None:
        return
    before, now = found.before.speed, found.now.speed
    if before is None or now is None:
        lacks = "the baseline has no speed: make it with --speed" if before is None else NO_CLAIM
        yield Gate("speed", "skipped", lacks)
        return
    if reason := same_speed(found.before, found.now):
        yield Gate("speed", "skipped", reason)
        return
    yield _plain("speed", _slowdown(before, now) <= limit, _speeds(before, now) + f", limit {percent(-limit)}")


def _slowdown(before: Speed, now: Speed) -> float:
    """The larger loss of the two."""
    return 1 - min(now.prefill / before.prefill, now.decode / before.decode)


def _speeds(before: Speed, now: Speed) -> str:
    parts = (("prefill", before.prefill, now.prefill), ("decode", before.decode, now.decode))
    return ", ".join(f"{name} {new:.0f} tokens/s, was {old:.0f} ({percent(new / old - 1)})" for name, old, new in parts)
