"""How fast a program is on a device: a few processes, each warm before it is timed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch

from afq_export.device.session import DeviceSession, Ran
from afq_export.errors import InputError
from afq_export.progress import Progress, silent
from afq_export.spec.device import ANSWER, PROMPT, REPETITIONS, Spread

NO_CLAIM = "emulated: no speed claim"
WARM = 1
"""Windows of a process before the one that counts."""


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Seconds to load, tokens per second, and MiB at the peak; `version` of the runtime where it says it."""

    load: Spread
    prefill: Spread
    decode: Spread
    memory: Spread
    version: str


def measure(
    session: DeviceSession, prompt: int = PROMPT, tokens: int = ANSWER, repetitions: int = REPETITIONS,
    progress: Progress = silent,
) -> Speeds:  # fmt: skip
    """`repetitions` processes with a prompt of `prompt` tokens and `tokens` single steps after it.

    What the tokens are makes no difference. Raises InputError when they do not fit the program's context.
    """
    context = session.limits.context
    if prompt + tokens > context:
        raise InputError("the tokens do not fit", why=f"{prompt} and {tokens}, the program's context is {context}")
    ids_T = torch.arange(prompt + tokens) % session.limits.vocab
    ids_NT = ids_T.repeat(WARM + 1, 1)
    ran: list[Ran] = []
    for index in range(repetitions):
        progress("repetitions", index, repetitions)
        ran.append(session.run(ids_NT, prompt=prompt, logits=False, scores=False))
    progress("repetitions", repetitions, repetitions)
    return Speeds(
        load=_spread(ran, lambda one: one.load),
        prefill=_spread(ran, lambda one: prompt / one.prefill[-1]),
        decode=_spread(ran, lambda one: tokens / one.decode[-1]),
        memory=_spread(ran, lambda one: one.memory),
        version=ran[0].version,
    )


def _spread(ran: Sequence[Ran], figure: Callable[[Ran], float]) -> Spread:
    values = [figure(one) for one in ran]
    return Spread(statistics.median(values), min(values), max(values))
