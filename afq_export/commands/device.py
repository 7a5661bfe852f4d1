"""`afq-export device`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afq_export.commands.options import BundlePath, Eval, Json
from afq_export.spec.device import ANSWER, PROMPT, REPETITIONS
from afq_export.terminal import emit, progress

if TYPE_CHECKING:
    from afq_export.spec.device import Bench, DeviceCheck, Listing, Spread

app = typer.Typer(name="device", help="Exported files where they run: this machine, emulated ARM, boards, phones.")

Name = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="host, arm64:CPU, ssh:USER@HOST[:PORT] or adb:SERIAL."),
]
Names = Annotated[
    list[str],
    typer.Option("--device", metavar="NAME", help="host, arm64:CPU, ssh:USER@HOST[:PORT] or adb:SERIAL; repeatable."),
]
Runner = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="A runner built for the device; libraries beside it go along (for Android)."),
]
Keep = Annotated[bool, typer.Option("--keep", help="Leave the folder on the device.")]
DeviceThreads = Annotated[
    int, typer.Option("--threads", min=0, metavar="N", help="Threads on the device; 0: as the runtime likes.")
]


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """Kinds of devices, what is there for each and what is missing, and the devices that are attached.

    Boards are not searched for: any machine that ssh reaches can be named.
    """
    from afq_export.device.listing import listing

    found = listing()
    emit(_listing(found), found, as_json)


@app.command()
def check(
    bundle: BundlePath,
    device: Names,
    eval: Eval = None,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Evaluation windows.")] = 2,
    window: Annotated[int, typer.Option(min=10, metavar="TOKENS", help="Tokens of a window.")] = 128,
    runner: Runner = None,
    keep: Keep = False,
    threads: DeviceThreads = 1,
    as_json: Json = False,
) -> None:
    """Run a bundle on devices and compare with this machine: every linear alone, prefill, and single steps.

    Linears are compared bit for bit (as far as a kernel promises) when the bundle lies in its run folder; choices and
    perplexity statistically, as rounding of float operators differs between processors. Nothing is left on a device.
    Exit codes: 0 all the same, 1 it departs or does not run, 2 wrong input, 3 the device or a runner is missing.
    """
    from afq_export.device.names import DeviceRequest, parse_devices
    from afq_export.validate.device_check import check_on_devices

    asked = DeviceRequest(parse_devices(device), windows, window, runner, keep, threads)
    with progress() as tick:
        found = check_on_devices(bundle, eval, asked, tick)
    emit(_check(found), found, as_json)
    raise typer.Exit(0 if found.verdict == "pass" else 1)


@app.command()
def bench(
    bundle: BundlePath,
    device: Name,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt.")] = PROMPT,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens after it, one by one.")] = ANSWER,
    repetitions: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes, each warm when it is timed.")
    ] = REPETITIONS,
    runner: Runner = None,
    keep: Keep = False,
    threads: DeviceThreads = 1,
    as_json: Json = False,
) -> None:
    """Time a bundle on a device: loading, prefill and decode in tokens per second, and the peak of memory."""
    from afq_export.device.names import DeviceRequest, parse_device
    from afq_export.validate.device_check import bench_on_device

    asked = DeviceRequest((parse_device(device),), runner=runner, keep=keep, threads=threads)
    with progress() as tick:
        found = bench_on_device(bundle, asked, prompt_tokens, tokens, repetitions, tick)
    emit(_bench(found), found, as_json)


def _listing(found: Listing) -> str:
    from afq_export.report.tables import Table

    kinds = tuple((k.form, k.found, "; ".join(k.missing) or "nothing", k.do) for k in found.kinds)
    attached = tuple((a.name, a.state, a.what) for a in found.attached)
    tables = (Table(("kind", "found", "missing", "do"), kinds), Table(("device", "state", "what"), attached))
    return "\n\n".join(table.text() for table in tables)


def _check(found: DeviceCheck) -> str:
    from afq_export.report.tables import Table, devices_table

    checks = tuple((c.name, c.status, c.detail) for c in found.checks)
    p = found.protocol
    lines = [f"{found.verdict.upper()}  {found.bundle}", Table(("check", "status", "detail"), checks).text()]
    if found.devices:
        lines.append(devices_table(found).text())
    text = f"{p.corpus} (sha256 {p.digest[:12]})"
    lines.append(f"{text}, {p.windows} of {p.windows_in_corpus} windows of {p.window} tokens")
    lines += [f"left on {device.device}: {device.folder}" for device in found.devices if device.folder]
    if not found.linears:
        lines.append("linears were not run alone: that takes the run folder around the bundle")
    return "\n\n".join(lines)


def _bench(found: Bench) -> str:
    lines = {
        "device": f"{found.device}, {found.processor}",
        "bundle": f"{found.bundle}, {found.model_bytes / 1e6:.1f} MB, {found.runtime}",
        "load": f"{_spread(found.load, '.3f')} s",
        "prefill": f"{_spread(found.prefill, '.1f')} tokens/s, a prompt of {found.prompt_tokens}",
        "decode": f"{_spread(found.decode, '.1f')} tokens/s, {found.tokens} tokens after it",
        "memory": f"{_spread(found.memory, '.0f')} MiB at the peak",
        "threads": f"{found.threads or 'as the runtime likes'}; median (lowest to highest) of {found.repetitions}",
    }
    lines |= {"claim": found.claim} if found.claim else {}
    lines |= {"left": found.folder} if found.folder else {}
    return "\n".join(f"{name.ljust(8)}  {value}" for name, value in lines.items())


def _spread(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.low:{form}} to {spread.high:{form}})"
