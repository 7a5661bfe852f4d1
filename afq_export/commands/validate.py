"""`afq-export validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afq_export.commands.options import Count, Eval, Json, Threads, Window, window_count
from afq_export.terminal import emit, progress


def command(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A run folder, or the bundle in one.")],
    eval: Eval = None,
    window: Window = None,
    windows: Count = None,
    threads: Threads = None,
    on: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND:NAME,...", help="Run the file on devices too, e.g. arm64:cortex-a55,cortex-a76."),
    ] = None,
    on_windows: Annotated[int, typer.Option(min=1, metavar="N", help="Evaluation windows on devices.")] = 2,
    on_window: Annotated[int, typer.Option(min=10, metavar="TOKENS", help="Tokens of a window on devices.")] = 128,
    as_json: Json = False,
) -> None:
    """Climb the ladder again on a bundle as it is now: float, folded, fake-quant, integer, the file in its runtime.

    Model, recipe and texts are those that the run folder names. Writes the bundle's reports anew. With --on, the file
    runs on emulated ARM processors as well (`doctor --install arm64` sets them up). Exit code 1 when a check failed.
    """
    from afq_export.device.names import DeviceRequest, parse_devices
    from afq_export.paths import run_folder
    from afq_export.report.summary import summary
    from afq_export.revalidate import revalidate

    count = window_count(windows)
    folder = run_folder(Path(bundle))
    asked = DeviceRequest(parse_devices(on), on_windows, on_window) if on else None
    with progress() as tick:
        report = revalidate(folder, tick, asked, eval=eval, window=window, eval_windows=count, threads=threads)
    emit(summary(report, folder.bundle), report, as_json)
    raise typer.Exit(1 if report.verdict == "fail" else 0)
