"""The exported file on devices: the same calls on the same windows as on this machine, and how the logits differ."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from afq_export.device.arm64.emulator import Emulator, open_emulators
from afq_export.device.arm64.session import SESSION_OPTIONS, Arm64Session, Kernels, Limits, Ran
from afq_export.device.names import DeviceName
from afq_export.errors import InputError, VerdictError
from afq_export.progress import Progress, silent
from afq_export.spec.report import Check, DeviceReport, Perplexity, ValidationReport
from afq_export.spec.target import TargetProfile
from afq_export.validate.device_linears import ComparedLinears, LinearProgram, compare_linears, linears_check
from afq_export.validate.evaluate import BROKEN, measure
from afq_export.validate.ladder import verdict

if TYPE_CHECKING:
    from afq_export.runtime.session import Session

TRACED = 9
"""Tokens whose instructions are counted: a prompt of eight, and one more as in generation."""
RECUT = 7
"""Tokens of a call when this machine is compared with itself: attention adds up in another order, all else stays."""
OTHER_FLOAT = 2.0
"""A device may choose otherwise this many times as often as this machine does against itself: on another instruction
set norms, nonlinearity and softmax round differently too, not attention alone."""
MOST_OTHER = 0.1
"""A device may never choose otherwise more often than this, however little this machine agrees with itself."""
UNLIKELY, DEVIATIONS = 0.01, 2.6
"""Chance below which a share of equal choices counts, and the standard errors beyond which a perplexity does."""
ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of a device against this machine's, on the same windows (see DeviceReport).

    `excess_stderr`: standard error of `excess`, from the differences of the tokens' losses.
    """

    bit_for_bit: float
    max_relative_error: float
    top1: float
    here: Perplexity
    there: Perplexity
    excess_stderr: float

    @property
    def excess(self) -> float:
        """The device's perplexity over this machine's, as a fraction."""
        return self.there.value / self.here.value - 1


@dataclasses.dataclass(frozen=True)
class Findings:
    """One report per device on which the file ran, one check per device."""

    reports: tuple[DeviceReport, ...]
    checks: tuple[Check, ...]

    def added_to(self, report: ValidationReport) -> ValidationReport:
        """`report` with what was found; a failed check fails the verdict."""
        checks = report.checks + self.checks
        return msgspec.structs.replace(report, checks=checks, devices=self.reports, verdict=verdict(checks))


def open_devices(names: Sequence[DeviceName]) -> tuple[Emulator, ...]:
    """The devices, ready to run. Raises MissingToolError when what they need is not installed."""
    return open_emulators([device.name for device in names]) if names else ()


def few_windows(ids_NT: Tensor, windows: int, window: int) -> Tensor:
    """`windows` of the evaluation windows, evenly spaced, the first `window` tokens of each. Raises InputError."""
    if min(window, ids_NT.shape[1]) <= TRACED:
        raise InputError("windows on devices are too short", why=f"{TRACED} tokens or fewer", do="give more")
    count = min(windows, len(ids_NT))
    chosen = torch.linspace(0, len(ids_NT) - 1, count).round().long() if count > 1 else torch.zeros(1, dtype=torch.long)
    return ids_NT[chosen, :window].contiguous()


def check_devices(
    devices: Sequence[Emulator],
    model: Path,
    target: TargetProfile,
    session: Session,
    ids_NT: Tensor,
    programs: Sequence[LinearProgram],
    progress: Progress = silent,
) -> Findings:
    """Runs `model` and `programs` on every device and compares with this machine: `session`, and what they hold.

    What differs because a float operator rounds otherwise is measured here as well: `session` against itself, cut into
    other calls. A file that does not run on a device is a failed check there, never an exception.
    """
    limits = Limits(session.vocab, session.context, session.prefill)
    here_NTV = torch.stack([session.logits(ids_T) for ids_T in ids_NT])
    own = compare(here_NTV, torch.stack([recut(session, ids_T) for ids_T in ids_NT]), ids_NT)
    tokens = len(next(iter(programs[0].inputs.values())))
    reports, checks = [], []
    for index, device in enumerate(devices):
        progress("devices", index, len(devices))
        there = Arm64Session(device, model, limits)
        try:
            linears = compare_linears(programs, there.linears(programs))
            ran, kernels = there.run(ids_NT), there.kernels(ids_NT[0, :TRACED])
        except VerdictError as error:
            checks.append(Check(name=f"on {device.name}", status="failed", detail=str(error)))
            continue
        compared = compare(here_NTV, ran.logits, ids_NT)
        note = arithmetic_note(kernels, session_config(model), linears)
        reports.append(_report(there, ran, kernels, linears, compared, own, note))
        checks += [
            linears_check(device.name, linears, tokens),
            judge(device.name, kernels.family, compared, own, target, note),
        ]
    progress("devices", len(devices), len(devices))
    return Findings(tuple(reports), tuple(checks))


def recut(session: Session, ids_T: Tensor) -> Tensor:
    """Float32 [T, V] of ids [T], like `session.logits`, in calls of RECUT tokens."""
    first, *others = ids_T.split(RECUT)
    rows = [session.logits(first).clone()]
    rows += [session.extend(ids, RECUT * (index + 1)).clone() for index, ids in enumerate(others)]
    return torch.cat(rows)


def compare(here_NTV: Tensor, there_NTV: Tensor, ids_NT: Tensor) -> Comparison:
    """Float32 logits [N, T, V] of the device against those of this machine for ids [N, T]."""
    recorded = {"here": _Recorded(here_NTV, ids_NT), "there": _Recorded(there_NTV, ids_NT)}
    measured = measure(recorded, ids_NT, [("here", "there")])
    pair = measured.pairs["here", "there"]
    here, there = measured.rungs["here"], measured.rungs["there"]
    difference = (there.nll - here.nll).flatten()
    largest = max(float((here - there).abs().max()) for here, there in zip(here_NTV, there_NTV, strict=True))
    return Comparison(
        bit_for_bit=float(pair.equal.double().mean()),
        max_relative_error=largest / max(float(here_NTV.abs().max()), 1e-30),
        top1=float(pair.same.double().mean()),
        here=here.perplexity,
        there=there.perplexity,
        excess_stderr=float(difference.std()) / math.sqrt(len(difference)),
    )


def judge(name: str, family: str, found: Comparison, own: Comparison, target: TargetProfile, note: str = "") -> Check:
    """Passed when perplexity and choices stay within what the target allows; a failure says first which does not.

    Few tokens are compared, so neither fails by chance: a perplexity fails when it is beyond its budget by more than
    DEVIATIONS standard errors, choices when a floor that holds would give as many others less often than UNLIKELY.
    Where activations are quantized, the last bit of a float operator moves whole codes: `own` is what that does to
    this machine against itself, and the floor is no higher than OTHER_FLOAT times that far from 1. NaN fails.
    """
    wrong = []
    if not abs(found.excess) - DEVIATIONS * found.excess_stderr <= target.perplexity_budget:
        wrong.append(f"perplexity differs by {found.excess:+.3%}, allowed {target.perplexity_budget:.2%}")
    tokens = found.here.tokens
    floor = 1 - target.agreement_floor
    other, rate = tokens - round(found.top1 * tokens), max(floor, min(MOST_OTHER, OTHER_FLOAT * (1 - own.top1)))
    if chance_of(other, tokens, rate) < UNLIKELY:
        wrong.append(f"other tokens are chosen at {other} of {tokens}, allowed {rate:.2%}")
    figures = (
        f"{family} kernels; perplexity {found.there.value:.4f}, {found.excess:+.3%} (stderr {found.excess_stderr:.3%}) "
        f"of {found.here.value:.4f} here; same token at {found.top1:.2%} of {tokens}, this machine against itself in "
        f"other calls {own.top1:.2%}; logits equal bit for bit at {found.bit_for_bit:.2%}, "
        f"largest difference {found.max_relative_error:.1e} of the largest logit, against itself "
        f"{own.max_relative_error:.1e}"
    )
    detail = "; ".join([*wrong, figures, *([note] if note else [])])
    return Check(name=f"on {name}", status="failed" if wrong else "passed", detail=detail)


def chance_of(events: int, trials: int, rate: float) -> float:
    """Probability of at least `events` in `trials` independent ones of probability `rate` each."""
    if not 0.0 < rate < 1.0:
        return float(events <= (trials if rate else 0))

    def exactly(k: int) -> float:
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        return math.exp(ways + k * math.log(rate) + (trials - k) * math.log1p(-rate))

    return 1.0 - math.fsum(map(exactly, range(events)))


def arithmetic_note(kernels: Kernels, config: dict[str, str], linears: ComparedLinears) -> str:
    """What is known to be computed otherwise on ARM by what ran there; empty when no linear departs, or none is known.

    ONNX Runtime's MatMulNBits at accuracy level 4 (what QDQ models get unless the session says less) quantizes
    activations in kernels that need dot products, and not all of them as on x86.
    """
    if not linears.beyond or "MatMulNBits" not in kernels.operators or config.get(ACCURACY_LEVEL, "4") != "4":
        return ""
    if kernels.family in ("neon", "float", "scalar"):
        return "MatMulNBits at accuracy level 4 computes in float32 there: this processor has no dot product"
    return "MatMulNBits at accuracy level 4 quantizes activations by another rule there than on x86"


def session_config(model: Path) -> dict[str, str]:
    """The session's configuration entries that the bundle names beside `model`; empty without such a file."""
    path = model.with_name(SESSION_OPTIONS)
    return json.loads(path.read_text(encoding="utf-8")).get("config", {}) if path.is_file() else {}


class _Recorded:
    """Logits that were computed before, as the session that `measure` asks."""

    def __init__(self, logits_NTV: Tensor, ids_NT: Tensor) -> None:
        self._rows = {tuple(ids.tolist()): logits for ids, logits in zip(ids_NT, logits_NTV, strict=True)}

    def logits(self, ids: Tensor) -> Tensor:
        return self._rows[tuple(ids.tolist())]


def _report(
    session: Arm64Session,
    ran: Ran,
    kernels: Kernels,
    linears: ComparedLinears,
    found: Comparison,
    own: Comparison,
    note: str,
) -> DeviceReport:
    installed = session.emulator.environment.installed
    windows, window = ran.logits.shape[:2]
    return DeviceReport(
        device=session.emulator.name,
        runtime=f"{session.runtime} {installed.versions[session.runtime]}",
        emulator=installed.emulator,
        family=kernels.family,
        instructions=kernels.instructions,
        operators=kernels.operators,
        linears=linears.count,
        exact_linears=linears.exact,
        worst_linear=linears.worst,
        linear_error=_finite(linears.error),
        windows=windows,
        window=window,
        bit_for_bit=found.bit_for_bit,
        max_relative_error=_finite(found.max_relative_error),
        top1=found.top1,
        own_top1=own.top1,
        own_max_relative_error=_finite(own.max_relative_error),
        excess_stderr=_finite(found.excess_stderr),
        here=found.here,
        there=found.there,
        seconds=ran.seconds,
        note=note,
    )


def _finite(value: float) -> float:
    """JSON has neither infinity nor NaN."""
    return value if math.isfinite(value) else BROKEN
