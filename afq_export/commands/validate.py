"""`afq-export validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afq_export.commands.device import Runner
from afq_export.commands.options import Count, Eval, Json, Threads, Window, window_count
from afq_export.terminal import emit, progress


def command(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A run folder, or the bundle in one.")],
    eval: Eval = None,
    window: Window = None,
    windows: Count = None,
    threads: Threads = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", "--on", metavar="NAME", help="Run the file there, too: as `device check` has it."),
    ] = None,
    device_windows: Annotated[
        int, typer.Option("--device-windows", "--on-windows", min=1, metavar="N", help="Windows on devices.")
    ] = 2,
    device_window: Annotated[
        int, typer.Option("--device-window", "--on-window", min=10, metavar="TOKENS", help="Tokens of them.")
    ] = 128,
    runner: Runner = None,
    as_json: Json = False,
) -> None:
    """Climb the ladder again on a bundle as it is now: float, folded, fake-quant, integer, the file in its runtime.

    Model, recipe and texts are those that the run folder names. Writes the bundle's reports anew. With --device, the
    file runs there as well (`device list` says what there is). Exit code 1 when a check failed.
    """
    from afq_export.device.names import DeviceRequest, parse_devices, refuse_lone_runner
    from afq_export.paths import run_folder
    from afq_export.report.summary import summary
    from afq_export.revalidate import revalidate

    count = window_count(windows)
    folder = run_folder(Path(bundle))
    refuse_lone_runner(runner, device)
    asked = DeviceRequest(parse_devices(device), device_windows, device_window, runner) if device else None
    with progress() as tick:
        report = revalidate(folder, tick, asked, eval=eval, window=window, eval_windows=count, threads=threads)
    emit(summary(report, folder.bundle), report, as_json)
    raise typer.Exit(1 if report.verdict == "fail" else 0)
