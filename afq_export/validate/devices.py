"""The exported file on devices: the same calls on the same windows as on this machine, and how the logits differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from afq_export.backends import backend
from afq_export.device.arm64.device import Arm64Device
from afq_export.device.kit import kit_for
from afq_export.device.names import DeviceName, DeviceRequest
from afq_export.device.open import open_device
from afq_export.device.program import Program, program_of
from afq_export.device.session import UNKNOWN, DeviceSession, Kernels, Limits, LinearProgram, Ran, open_session
from afq_export.device.transport import Device, DeviceFacts
from afq_export.errors import InputError, VerdictError
from afq_export.lower.bundle import Bundle
from afq_export.progress import Progress, silent
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.spec.report import Check, DeviceReport, ValidationReport
from afq_export.spec.target import TargetProfile
from afq_export.validate.device_linears import ComparedLinears, compare_linears, linears_check, record_linears
from afq_export.validate.device_logits import Comparison, compare, judge, recut, refuse_other_losses
from afq_export.validate.evaluate import BROKEN
from afq_export.validate.ladder import verdict

if TYPE_CHECKING:
    from afq_export.runtime.session import Session

TRACED = 9
"""Tokens whose instructions are counted: a prompt of eight, and one more as in generation."""
LINEAR_TOKENS = 64
"""Tokens on which linears alone are compared on devices."""
DECODED, DECODE_PROMPT = 16, 8
"""Tokens of the first window that are run again, those after the prompt one by one."""
DOT_PRODUCT = "asimddp"
"""What /proc/cpuinfo calls it."""
ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"


@dataclasses.dataclass(frozen=True)
class Findings:
    """One report per device on which the file ran, one check per device."""

    reports: tuple[DeviceReport, ...]
    checks: tuple[Check, ...]

    def added_to(self, report: ValidationReport) -> ValidationReport:
        """`report` with what was found; a failed check fails the verdict."""
        checks = report.checks + self.checks
        return msgspec.structs.replace(report, checks=checks, devices=self.reports, verdict=verdict(checks))


def open_devices(names: Sequence[DeviceName]) -> tuple[Device, ...]:
    """The devices, which answered. Raises MissingToolError when one is not there or what it needs is not installed."""
    devices = tuple(map(open_device, names))
    for device in devices:
        device.facts()
    return devices


def few_windows(ids_NT: Tensor, windows: int, window: int) -> Tensor:
    """`windows` of the evaluation windows, evenly spaced, the first `window` tokens of each. Raises InputError."""
    if min(window, ids_NT.shape[1]) <= TRACED:
        raise InputError("windows on devices are too short", why=f"{TRACED} tokens or fewer", do="give more")
    count = min(windows, len(ids_NT))
    chosen = torch.linspace(0, len(ids_NT) - 1, count).round().long() if count > 1 else torch.zeros(1, dtype=torch.long)
    return ids_NT[chosen, :window].contiguous()


def ready_program(bundle: Bundle, on: DeviceRequest, devices: Sequence[Device]) -> Program:
    """What the devices run: said before anything is measured. Raises InputError where they cannot, MissingToolError."""
    program = program_of(bundle, own_runner=on.runner is not None)
    for device in devices:
        kit_for(program.runtime, device.facts(), on.runner)
    return program


def check_bundle(
    bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint | None, on: DeviceRequest,
    devices: Sequence[Device], ids_NT: Tensor, progress: Progress = silent,
) -> Findings:  # fmt: skip
    """`check_devices` of a bundle, on the windows int64 [N, T]; without its checkpoint no linears alone."""
    program = ready_program(bundle, on, devices)
    runtime = backend(bundle.backend)
    session, programs = runtime.open_session(bundle), []
    probe = runtime.runtime(bundle, target, checkpoint).probe if checkpoint else None
    if checkpoint and probe:
        programs = record_linears(checkpoint, target, ids_NT[0, :LINEAR_TOKENS], probe, progress)
    return check_devices(devices, program, target, session, ids_NT, programs, on, progress)


def check_devices(
    devices: Sequence[Device],
    program: Program,
    target: TargetProfile,
    session: Session,
    ids_NT: Tensor,
    programs: Sequence[LinearProgram],
    on: DeviceRequest,
    progress: Progress = silent,
) -> Findings:
    """Runs `program` and `programs` on every device and compares with this machine: `session`, and what they hold.

    What differs because a float operator rounds otherwise is measured here as well: `session` against itself, cut into
    other calls. A file that does not run on a device is a failed check there, never an exception.
    """
    limits = Limits(session.vocab, session.context, session.prefill)
    here_NTV = torch.stack([session.logits(ids_T) for ids_T in ids_NT])
    own = compare(here_NTV, torch.stack([recut(session, ids_T) for ids_T in ids_NT]), ids_NT)
    few_NT = ids_NT[:1, :DECODED]
    decoded_NTV = torch.stack([recut(session, ids_T, 1, DECODE_PROMPT) for ids_T in few_NT])
    reports, checks = [], []
    for index, device in enumerate(devices):
        progress("devices", index, len(devices))
        try:
            with open_session(device, program, limits, runner=on.runner, keep=on.keep, threads=on.threads) as there:
                linears = compare_linears(programs, there.linears(programs)) if programs else NO_LINEARS
                ran, kernels = there.run(ids_NT), there.kernels(ids_NT[0, :TRACED])
                stepped = there.run(few_NT, prompt=DECODE_PROMPT)
            refuse_other_losses(device.name, ran, ids_NT)
        except VerdictError as error:
            checks.append(Check(name=f"on {device.name}", status="failed", detail=str(error)))
            continue
        compared = compare(here_NTV, ran.given_logits, ids_NT)
        steps = compare(decoded_NTV, stepped.given_logits, few_NT)
        note = arithmetic_note(kernels, there.facts, program, linears)
        reports.append(_report(there, ran, kernels, linears, compared, own, note, on.keep))
        if programs:
            checks.append(linears_check(device.name, linears, len(next(iter(programs[0].inputs.values())))))
        checks += [
            judge(device.name, kernels.family, compared, own, target, note),
            judge(device.name, kernels.family, steps, own, target, step=True),
        ]
    progress("devices", len(devices), len(devices))
    return Findings(tuple(reports), tuple(checks))


def arithmetic_note(kernels: Kernels, facts: DeviceFacts, program: Program, linears: ComparedLinears) -> str:
    """What is known to be computed otherwise on ARM by what ran there; empty when no linear departs, or none is known.

    ONNX Runtime's MatMulNBits at accuracy level 4 (what QDQ models get unless the session says less) quantizes
    activations in kernels that need dot products, and not all of them as on x86.
    """
    level = program.options.session.get(ACCURACY_LEVEL, "4") if program.options else ""
    if not linears.beyond or "MatMulNBits" not in kernels.operators or level != "4" or facts.abi != "aarch64":
        return ""
    without = kernels.family == UNKNOWN and facts.cpu_features and DOT_PRODUCT not in facts.cpu_features
    if kernels.family in ("neon", "float", "scalar") or without:
        return "MatMulNBits at accuracy level 4 computes in float32 there: this processor has no dot product"
    return "MatMulNBits at accuracy level 4 quantizes activations by another rule there than on x86"


NO_LINEARS = ComparedLinears(count=0, exact=0, beyond={}, worst=None, error=0.0)
"""Where there is no checkpoint to take linears from."""


def _report(
    there: DeviceSession,
    ran: Ran,
    kernels: Kernels,
    linears: ComparedLinears,
    found: Comparison,
    own: Comparison,
    note: str,
    kept: bool,
) -> DeviceReport:
    windows, predicted = ran.losses.shape
    return DeviceReport(
        device=there.device.name,
        runtime=f"{there.program.runtime} {ran.version}".strip(),
        processor=there.facts.processor,
        emulator=_emulator(there.device),
        family=kernels.family,
        instructions=dict(kernels.instructions),
        operators=dict(kernels.operators),
        linears=linears.count,
        exact_linears=linears.exact,
        worst_linear=linears.worst,
        linear_error=_finite(linears.error),
        windows=windows,
        window=predicted + 1,
        bit_for_bit=found.bit_for_bit,
        max_relative_error=_finite(found.max_relative_error),
        top1=found.top1,
        own_top1=own.top1,
        own_max_relative_error=_finite(own.max_relative_error),
        excess_stderr=_finite(found.excess_stderr),
        first_other=found.first(),
        here=found.here,
        there=found.there,
        seconds=ran.seconds,
        note=note,
        folder=there.folder if kept else "",
    )


def _emulator(device: Device) -> str | None:
    if isinstance(device, Arm64Device):
        return device.environment.installed.emulator
    return "an emulator of its own" if device.emulated else None


def _finite(value: float) -> float:
    """JSON has neither infinity nor NaN."""
    return value if math.isfinite(value) else BROKEN
