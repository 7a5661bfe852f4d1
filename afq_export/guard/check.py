"""`check`: a bundle measured again and held to its baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from afq_export.device.names import DeviceRequest
from afq_export.guard import gates
from afq_export.guard.baseline import first_losses, mean_divergence, stored_tokens
from afq_export.guard.compare import agreement, first_other, paired, worst_places
from afq_export.guard.facts import differences
from afq_export.guard.file import read_baseline
from afq_export.guard.on_device import measured_where
from afq_export.guard.subject import open_subject, protocol, windows_of
from afq_export.load.corpus import Windows
from afq_export.perplexity import refuse_other_protocol
from afq_export.progress import Progress
from afq_export.spec.guard import CheckReport, Departure, Limits

WORST = 3
"""Windows that are named."""
BEFORE = 8
"""Tokens of text before a departure."""


def check(
    bundle: str, path: Path, text: str | None, limits: Limits, threads: int, progress: Progress,
    on: DeviceRequest | None = None,
) -> CheckReport:  # fmt: skip
    """The whole comparison. Raises InputError when the two are not of the same protocol, and for broken input.

    `text` names the evaluation text where it is not a shipped one. `on`: the one device to measure on, in place of this
    machine.
    """
    baseline = read_baseline(path)
    before, first = stored_tokens(baseline, str(path)), first_losses(baseline, str(path))
    subject = open_subject(bundle)
    windows = windows_of(subject, baseline.protocol, text)
    refuse_other_protocol(baseline.protocol, protocol(windows))
    timed = limits.slowdown is not None
    measured = measured_where(subject, windows, threads, progress, before, timed, on)
    now = measured.tokens
    same = now.digest == before.digest
    found = gates.Comparison(
        drift=paired(now.nll, before.nll),
        cumulative=paired(now.nll, first),
        top1=agreement(now, before),
        kl=mean_divergence(before, measured),
        identical=float(same.mean()),
        first_other=first_other(same),
        broken=int((~np.isfinite(now.nll)).sum()),
        before=baseline.facts,
        now=measured.facts,
    )
    decided = gates.all_gates(found, limits, baseline.protocol)
    return CheckReport(
        verdict=gates.verdict(decided),
        bundle=bundle,
        baseline=str(path),
        limits=limits,
        protocol=baseline.protocol,
        perplexity=measured.facts.perplexity,
        baseline_perplexity=baseline.facts.perplexity,
        drift=found.drift.drift,
        cumulative=found.cumulative.drift,
        top1=found.top1,
        kl=found.kl,
        identical=found.identical,
        first_other=found.first_other,
        speed=measured.facts.speed,
        gates=decided,
        differences=differences(baseline.facts, measured.facts),
        worst=_departures(now.nll, before.nll, windows, subject.tokenizer),
        facts=measured.facts,
        device=str(on.devices[0]) if on else "",
    )


def _departures(now: np.ndarray, before: np.ndarray, windows: Windows, tokenizer: Any) -> tuple[Departure, ...]:
    """Where the loss rose most, with the text there. Place p predicts the token p + 1 of its window."""
    found = []
    for window, place in worst_places(now, before, WORST):
        ids = windows.ids_NT[window]
        found.append(
            Departure(
                window=window,
                position=place + 1,
                before=tokenizer.decode(ids[max(0, place + 1 - BEFORE) : place + 1]),
                token=tokenizer.decode(ids[place + 1 : place + 2]),
                was=float(before[window, place]),
                now=float(now[window, place]),
            )
        )
    return tuple(found)
