"""`afq-export baseline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afq_export.commands.check import BaselineFile, BaselineText, BundlePath, Where
from afq_export.commands.device import Runner
from afq_export.commands.options import Count, Eval, Json, Threads, Window, window_count
from afq_export.terminal import emit, progress

app = typer.Typer(name="baseline", help="What `check` compares with: made once, then changed by recorded updates.")


@app.command()
def create(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the baseline goes, e.g. model.afqb.")],
    eval: Eval = None,
    window: Window = None,
    windows: Count = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second, too.")] = False,
    device: Where = None,
    runner: Runner = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle through its runtime and keep what it said of every token. Refuses to overwrite a baseline."""
    taken = window_count(windows)
    from afq_export.device.names import one_device
    from afq_export.files import refuse_unwritable
    from afq_export.guard.baseline import create as make
    from afq_export.guard.baseline import refuse_overwriting
    from afq_export.guard.file import write_baseline
    from afq_export.guard.on_device import measured_where
    from afq_export.guard.subject import new_windows, open_subject, protocol
    from afq_export.guard.text import baseline_text
    from afq_export.machine import default_threads, settle

    refuse_overwriting(out)
    refuse_unwritable(out)
    on = one_device(device, runner, threads)
    count = threads or default_threads()
    settle(count)
    subject = open_subject(bundle)
    cut = new_windows(subject, eval, window, taken)
    with progress() as tick:
        measured = measured_where(subject, cut, count, tick, None, speed, on)
    made = make(measured, protocol(cut))
    write_baseline(out, made)
    emit(f"{baseline_text(made)}\nwritten     {out}, {out.stat().st_size} bytes", _shown(made), as_json)


@app.command()
def update(
    bundle: BundlePath,
    baseline: BaselineFile,
    who: Annotated[str, typer.Option(metavar="NAME", help="Who accepts the change.")],
    what: Annotated[str, typer.Option(metavar="TEXT", help="What changed.")],
    why: Annotated[str, typer.Option(metavar="TEXT", help="Why it is accepted.")],
    eval: BaselineText = None,
    device: Where = None,
    runner: Runner = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Put a bundle in the baseline's place, and record who, what, why, the old figures and the drift since the first.

    Measured by the baseline's own protocol. What drifts beyond the limits since the first baseline still fails `check`.
    """
    from afq_export.device.names import one_device
    from afq_export.files import refuse_unwritable
    from afq_export.guard.baseline import refuse_unsaid, stored_tokens
    from afq_export.guard.baseline import update as put
    from afq_export.guard.file import read_baseline, write_baseline
    from afq_export.guard.on_device import measured_where
    from afq_export.guard.subject import open_subject, protocol, windows_of
    from afq_export.guard.text import baseline_text
    from afq_export.machine import default_threads, settle
    from afq_export.perplexity import refuse_other_protocol

    refuse_unsaid(who, what, why)
    on = one_device(device, runner, threads)
    count = threads or default_threads()
    settle(count)
    old = read_baseline(baseline)
    refuse_unwritable(baseline)
    before = stored_tokens(old, str(baseline))
    subject = open_subject(bundle)
    cut = windows_of(subject, old.protocol, eval)
    refuse_other_protocol(old.protocol, protocol(cut))
    with progress() as tick:
        measured = measured_where(subject, cut, count, tick, before, old.facts.speed is not None, on)
    new = put(old, measured, who, what, why, str(baseline))
    write_baseline(baseline, new)
    emit(baseline_text(new), _shown(new), as_json)


@app.command()
def show(
    baseline: Annotated[Path, typer.Argument(metavar="FILE", help="What `baseline create` wrote.")],
    as_json: Json = False,
) -> None:
    """What a baseline was measured from, with the figures, and every update of it."""
    from afq_export.guard.baseline import first_losses, stored_tokens
    from afq_export.guard.file import read_baseline
    from afq_export.guard.text import baseline_text

    found = read_baseline(baseline)
    stored_tokens(found, str(baseline)), first_losses(found, str(baseline))
    emit(baseline_text(found), _shown(found), as_json)


def _shown(baseline) -> dict[str, object]:
    """A baseline without what it holds of every token."""
    import msgspec

    return {key: value for key, value in msgspec.structs.asdict(baseline).items() if key not in ("tokens", "first_nll")}
