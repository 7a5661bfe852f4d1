"""Baselines: made once, and then changed only by an update that says who, what and why."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import msgspec
import numpy as np

from afq_export.errors import InputError, VerdictError
from afq_export.guard.compare import agreement, divergence, paired
from afq_export.guard.subject import Measured
from afq_export.guard.tokens import Tokens, from_columns, losses, to_columns
from afq_export.spec.baseline import Baseline, Update
from afq_export.spec.report import Protocol


def refuse_overwriting(path: Path) -> None:
    """Raises InputError when there is something at `path`: a baseline is replaced by updates alone."""
    if path.exists():
        raise InputError(
            "there is a baseline already", where=str(path), why="creating it anew would forget where it started",
            do="use `afq-export baseline update`, or remove it",
        )  # fmt: skip


def refuse_unsaid(who: str, what: str, why: str) -> None:
    """Raises InputError when one of them says nothing."""
    said = {"--who": who, "--what": what, "--why": why}
    if empty := [name for name, text in said.items() if not text.strip()]:
        raise InputError("an update says who, what and why", why=f"{', '.join(empty)} is empty")


def create(measured: Measured, protocol: Protocol) -> Baseline:
    """The first baseline. Raises VerdictError when a loss is not finite."""
    _refuse_broken(measured)
    return Baseline(
        created=today(), protocol=protocol, facts=measured.facts, tokens=to_columns(measured.tokens), first_nll=None
    )


def update(baseline: Baseline, measured: Measured, who: str, what: str, why: str, where: str) -> Baseline:
    """`baseline` with `measured` in its place, and the old figures and the drift in its history.

    Raises InputError when `who`, `what` or `why` says nothing, VerdictError when a loss is not finite.
    """
    refuse_unsaid(who, what, why)
    _refuse_broken(measured)
    before, first = stored_tokens(baseline, where), first_losses(baseline, where)
    now = measured.tokens
    entry = Update(
        who=who.strip(),
        what=what.strip(),
        why=why.strip(),
        date=today(),
        before=baseline.facts,
        drift=paired(now.nll, before.nll).drift,
        cumulative=paired(now.nll, first).drift,
        top1=agreement(now, before),
        kl=mean_divergence(before, measured),
    )
    return msgspec.structs.replace(
        baseline,
        facts=measured.facts,
        tokens=to_columns(now),
        first_nll=baseline.first_nll or baseline.tokens.nll,
        updates=(*baseline.updates, entry),
    )


def stored_tokens(baseline: Baseline, where: str) -> Tokens:
    """The tokens of a baseline. Raises InputError when they are damaged."""
    protocol = baseline.protocol
    if protocol.windows < 2 or protocol.window < 2:
        raise InputError("the baseline is damaged", where=where, why="it has fewer than 2 windows of 2 tokens")
    return from_columns(baseline.tokens, protocol.windows, protocol.window - 1, where)


def first_losses(baseline: Baseline, where: str) -> np.ndarray:
    """Losses [N, P] of the first baseline. Raises InputError when they are damaged."""
    data = baseline.first_nll if baseline.first_nll is not None else baseline.tokens.nll
    return losses(data, baseline.protocol.windows, baseline.protocol.window - 1, where)


def mean_divergence(before: Tokens, measured: Measured) -> float:
    """Mean KL over all tokens, as `divergence` has it."""
    assert measured.there is not None
    same = before.digest == measured.tokens.digest
    return float(divergence(before.logs, measured.there, same).mean())


def today() -> str:
    """The date, of SOURCE_DATE_EPOCH where a reproducible build sets it. Raises InputError for one beyond dates."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.datetime.now(datetime.UTC)
    try:
        at = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC) if seconds.isdecimal() else now
    except (ValueError, OverflowError, OSError) as error:
        raise InputError("SOURCE_DATE_EPOCH is no date", why=str(error), do="unset it, or set it to seconds") from error
    return at.date().isoformat()


def _refuse_broken(measured: Measured) -> None:
    broken = int((~np.isfinite(measured.tokens.nll)).sum())
    if broken:
        raise VerdictError("the bundle is broken", why=f"{broken} losses are no finite number", do="export it again")
