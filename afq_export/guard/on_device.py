"""A bundle measured for the guard where it runs: the same windows, asked of a device."""

from __future__ import annotations

from afq_export.device import bench
from afq_export.device.names import DeviceRequest
from afq_export.device.open import open_device
from afq_export.device.program import program_of
from afq_export.device.session import Limits, WindowSession, open_session
from afq_export.guard.facts import facts_of
from afq_export.guard.record import record
from afq_export.guard.subject import Measured, Subject, measure, refuse_other_shape
from afq_export.guard.tokens import Tokens
from afq_export.load.corpus import Windows
from afq_export.machine import CPU_FLAGS, cpu_name
from afq_export.progress import Progress
from afq_export.spec.baseline import Machine, Speed


def measured_where(
    subject: Subject,
    windows: Windows,
    threads: int,
    progress: Progress,
    reference: Tokens | None,
    speed: bool,
    on: DeviceRequest | None,
) -> Measured:
    """`measure_on` the device, or where there is none `measure` on this machine."""
    if on:
        return measure_on(subject, windows, on, progress, reference, speed)
    return measure(subject, windows, threads, progress, reference, speed)


def measure_on(
    subject: Subject, windows: Windows, on: DeviceRequest, progress: Progress, reference: Tokens | None, speed: bool
) -> Measured:
    """Every window through the runtime of the one device of `on`, and its speed when asked for (see `measure`), but
    never that of an emulated one.

    Raises MissingToolError when the device is not there, VerdictError when the bundle does not run on it.
    """
    refuse_other_shape(reference, windows)
    device, here = open_device(on.devices[0]), subject.session
    program = program_of(subject.bundle, own_runner=on.runner is not None)
    limits = Limits(here.vocab, here.context, here.prefill)
    with open_session(device, program, limits, runner=on.runner, keep=on.keep, threads=on.threads) as session:
        asked = WindowSession(session, windows.ids_NT)
        stats, tokens, there = record(asked, windows.ids_NT, progress, reference)  # type: ignore[arg-type]
        timed = bench.measure(session, progress=progress) if speed and not device.emulated else None
    facts = device.facts()
    flags = tuple(flag for flag in CPU_FLAGS if flag in facts.cpu_features)
    machine = Machine(facts.abi, cpu_name() if facts.kind == "host" else facts.processor, flags, on.threads)
    # A runner in C++ has other float kernels than the runtime's Python package: the same bits are not promised.
    script = session.kit.name.endswith(".py")
    version = asked.version if script else f"{asked.version or 'unknown'} in {session.kit.name}"
    measured = Speed(prefill=timed.prefill.median, decode=timed.decode.median) if timed else None
    return Measured(facts_of(subject.bundle, stats.perplexity, machine, measured, version), tokens, there)
