"""Tokens per second of a session. The best of a few tries: what else runs only ever makes one slower."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from afq_export.runtime.session import Session
from afq_export.spec.baseline import Speed

TRIES = 5
PROMPT, ANSWER = 16, 32
"""Tokens before and in a timed stretch of single steps."""


def measure_speed(session: Session, ids_T: Tensor) -> Speed:
    """Of one call with as many of `ids_T` as fit, and of single steps after a short prompt. Needs 3 tokens."""
    prompt = ids_T[: session.prefill]
    start = min(PROMPT, len(ids_T) // 2)
    answer = ids_T[start : start + ANSWER]

    def steps() -> None:
        for place in range(len(answer)):
            session.extend(answer[place : place + 1], start + place)

    prefill = min(_seconds(lambda: session.logits(prompt)) for _ in range(TRIES))
    session.logits(ids_T[:start])  # what the steps follow
    decode = min(_seconds(steps) for _ in range(TRIES))
    return Speed(prefill=len(prompt) / prefill, decode=len(answer) / decode)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
