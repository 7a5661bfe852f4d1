"""Logits of one program from two places: how far they are apart, and whether that is more than rounding and chance."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afq_export.device.session import UNKNOWN, Ran
from afq_export.errors import VerdictError
from afq_export.spec.report import Check, Perplexity
from afq_export.spec.target import TargetProfile
from afq_export.validate.evaluate import measure

if TYPE_CHECKING:
    from afq_export.runtime.session import Session

RECUT = 7
"""Tokens of a call when this machine is compared with itself: attention adds up in another order, all else stays."""
OTHER_FLOAT = 2.0
"""A device may choose otherwise this many times as often as this machine does against itself: on another instruction
set norms, nonlinearity and softmax round differently too, not attention alone."""
SAME_LOSS = 1e-7
"""Nats between two float64 sums of the same exponentials."""
FLOAT_NOISE = 1e-6
"""A difference of logits, over the largest, that is rounding wherever it comes from."""
MOST_OTHER = 0.1
"""A device may never choose otherwise more often than this, however little this machine agrees with itself."""
UNLIKELY, DEVIATIONS = 0.01, 2.6
"""Chance below which a share of equal choices counts, and the standard errors beyond which a perplexity does."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of a device against this machine's, on the same windows (see DeviceReport).

    `excess_stderr`: standard error of `excess`, from the differences of the tokens' losses. `errors` [N, T]: of each
    token, the largest difference of its logits over the largest |logit| of all.
    """

    bit_for_bit: float
    max_relative_error: float
    top1: float
    here: Perplexity
    there: Perplexity
    excess_stderr: float
    errors: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 0), repr=False)

    def first(self, bound: float = 0.0) -> tuple[int, int] | None:
        """Window and token of the first error beyond `bound` (or that is no number), None when there is none."""
        places = (~(self.errors <= bound)).nonzero()
        return (int(places[0, 0]), int(places[0, 1])) if len(places) else None

    @property
    def excess(self) -> float:
        """The device's perplexity over this machine's, as a fraction."""
        return self.there.value / self.here.value - 1


def recut(session: Session, ids_T: Tensor, call: int = RECUT, prompt: int = 0) -> Tensor:
    """Float32 [T, V] of ids [T], like `session.logits`: a first call of `prompt` tokens, then calls of `call`."""
    start = prompt or call
    rows = [session.logits(ids_T[:start]).clone()]
    rows += [session.extend(ids_T[at : at + call], at).clone() for at in range(start, len(ids_T), call)]
    return torch.cat(rows)


def compare(here_NTV: Tensor, there_NTV: Tensor, ids_NT: Tensor) -> Comparison:
    """Float32 logits [N, T, V] of the device against those of this machine for ids [N, T]."""
    recorded = {"here": _Recorded(here_NTV, ids_NT), "there": _Recorded(there_NTV, ids_NT)}
    measured = measure(recorded, ids_NT, [("here", "there")])
    pair = measured.pairs["here", "there"]
    here, there = measured.rungs["here"], measured.rungs["there"]
    difference = (there.nll - here.nll).flatten()
    largest = max(float(here_NTV.abs().max()), 1e-30)
    errors_NT = (
        torch.stack([(x - y).abs().amax(-1) for x, y in zip(here_NTV, there_NTV, strict=True)]).double() / largest
    )
    return Comparison(
        bit_for_bit=float(pair.equal.double().mean()),
        max_relative_error=float(errors_NT.max()),
        top1=float(pair.same.double().mean()),
        here=here.perplexity,
        there=there.perplexity,
        excess_stderr=float(difference.std()) / math.sqrt(len(difference)),
        errors=errors_NT,
    )


def refuse_other_losses(name: str, ran: Ran, ids_NT: Tensor) -> None:
    """Raises VerdictError unless the losses and choices that the device `name` computed are those of its logits."""
    for window, ids_T in enumerate(ids_NT):
        logits_TV = ran.given_logits[window, :-1].double()
        losses_T = -logits_TV.log_softmax(-1).gather(-1, ids_T[1:, None])[:, 0]
        same = torch.isclose(ran.losses[window], losses_T, rtol=1e-9, atol=SAME_LOSS, equal_nan=True)
        same &= (ran.choices[window] == logits_TV.argmax(-1)) | losses_T.isnan()
        if not same.all():
            why = f"losses of vector {window} from token {int((~same).nonzero()[0])} are not those of its logits"
            raise VerdictError("the exported file does not run", where=name, why=why)


def judge(
    name: str,
    family: str,
    found: Comparison,
    own: Comparison,
    target: TargetProfile,
    note: str = "",
    *,
    step: bool = False,
) -> Check:
    """Passed when perplexity and choices stay within what the target allows; a failure says first which does not.

    Few tokens are compared, so neither fails by chance: a perplexity fails when it is beyond its budget by more than
    DEVIATIONS standard errors, choices when a floor that holds would give as many others less often than UNLIKELY.
    Where activations are quantized, the last bit of a float operator moves whole codes: `own` is what that does to
    this machine against itself, and the floor is no higher than OTHER_FLOAT times that far from 1. NaN fails. `step`:
    `found` is of tokens that were decoded one by one.
    """
    wrong = []
    if not abs(found.excess) - DEVIATIONS * found.excess_stderr <= target.perplexity_budget:
        wrong.append(f"perplexity differs by {found.excess:+.3%}, allowed {target.perplexity_budget:.2%}")
    tokens = found.here.tokens
    floor = 1 - target.agreement_floor
    other, rate = tokens - round(found.top1 * tokens), max(floor, min(MOST_OTHER, OTHER_FLOAT * (1 - own.top1)))
    if chance_of(other, tokens, rate) < UNLIKELY:
        wrong.append(f"other tokens are chosen at {other} of {tokens}, allowed {rate:.2%}")
    place = found.first(max(FLOAT_NOISE, OTHER_FLOAT * own.max_relative_error))
    if wrong and place:
        wrong.append(f"vector {place[0]} departs first, at token {place[1]}")
    kernels = "" if family == UNKNOWN else f"{family} kernels; "
    figures = (
        f"{kernels}perplexity {found.there.value:.4f}, {found.excess:+.3%} (stderr {found.excess_stderr:.3%}) "
        f"of {found.here.value:.4f} here; same token at {found.top1:.2%} of {tokens}, this machine against itself in "
        f"other calls {own.top1:.2%}; logits equal bit for bit at {found.bit_for_bit:.2%}, "
        f"largest difference {found.max_relative_error:.1e} of the largest logit, against itself "
        f"{own.max_relative_error:.1e}"
    )
    detail = "; ".join([*wrong, figures, *([note] if note else [])])
    return Check(name=f"{'steps ' if step else ''}on {name}", status="failed" if wrong else "passed", detail=detail)


def chance_of(events: int, trials: int, rate: float) -> float:
    """Probability of at least `events` in `trials` independent ones of probability `rate` each."""
    if not 0.0 < rate < 1.0:
        return float(events <= (trials if rate else 0))

    def exactly(k: int) -> float:
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        return math.exp(ways + k * math.log(rate) + (trials - k) * math.log1p(-rate))

    return 1.0 - math.fsum(map(exactly, range(events)))


class _Recorded:
    """Logits that were computed before, as the session that `measure` asks."""

    def __init__(self, logits_NTV: Tensor, ids_NT: Tensor) -> None:
        self._rows = {tuple(ids.tolist()): logits for ids, logits in zip(ids_NT, logits_NTV, strict=True)}

    def logits(self, ids: Tensor) -> Tensor:
        return self._rows[tuple(ids.tolist())]
