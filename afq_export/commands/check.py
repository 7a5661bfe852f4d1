"""`afq-export check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afq_export.commands.device import Runner
from afq_export.commands.options import BundlePath, Json, Threads
from afq_export.terminal import emit, note, progress

BaselineText = Annotated[
    str | None,
    typer.Option(metavar="NAME|TOML|TEXT", help="The baseline's text (default: the shipped one of its name)."),
]
BaselineFile = Annotated[Path, typer.Option(metavar="FILE", help="What `baseline create` wrote.")]
Where = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="Measure there: host, arm64:CPU, ssh:USER@HOST or adb:SERIAL."),
]


def command(
    bundle: BundlePath,
    baseline: BaselineFile,
    eval: BaselineText = None,
    limits: Annotated[
        Path | None,
        typer.Option(metavar="TOML", help="Limits by name, e.g. drift = 0.005; options go first."),
    ] = None,
    drift: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Rise of perplexity over the baseline (default: 0.5%).")
    ] = None,
    cumulative: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Rise over the first baseline (default: 1%).")
    ] = None,
    top1: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Least share of tokens with its choice (default: 98%).")
    ] = None,
    kl: Annotated[str | None, typer.Option(metavar="NATS", help="Mean KL divergence a token (default: 0.001).")] = None,
    size: Annotated[str | None, typer.Option(metavar="SHARE", help="Growth of the file (default: 2%).")] = None,
    slowdown: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Loss of tokens per second (default: not measured).")
    ] = None,
    identical: Annotated[
        str | None,
        typer.Option(metavar="off|same-machine|always", help="All logits equal to the last bit, where (default: off)."),
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="XML", help="Write a JUnit report, also when refused.")] = None,
    github: Annotated[bool, typer.Option("--github", help="GitHub annotations (in a workflow: always).")] = False,
    device: Where = None,
    runner: Runner = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Hold a bundle to a baseline: measured again through its runtime, compared token by token.

    A drift passes when a rise to the limit is excluded, and fails when one beyond it is certain; between them the
    answer is "not enough tokens", which is no pass. SHARE is 0.5% or 0.005; inf switches a gate off.
    Exit codes: 0 all gates passed, 1 one did not, 2 not comparable, 3 the runtime or the device is missing.
    """
    import os

    from afq_export.device.names import one_device
    from afq_export.errors import AfqError
    from afq_export.files import refuse_unwritable, write_text
    from afq_export.guard import github as annotate
    from afq_export.guard.check import check
    from afq_export.guard.junit import junit as junit_text
    from afq_export.guard.junit import junit_error
    from afq_export.guard.limits import read_limits
    from afq_export.guard.text import markdown, text
    from afq_export.machine import default_threads, settle

    annotated = github or annotate.wanted(os.environ)
    # With --json standard output holds the one document; the runner reads commands on standard error as well.
    say = note if as_json else print
    given = {
        "drift": drift, "cumulative": cumulative, "top1": top1, "kl": kl, "size": size, "slowdown": slowdown,
        "identical": identical,
    }  # fmt: skip
    if junit:
        refuse_unwritable(junit)
    try:
        on = one_device(device, runner, threads)
        asked = read_limits(limits, {name: value for name, value in given.items() if value is not None})
        count = threads or default_threads()
        settle(count)
        with progress() as tick:
            report = check(bundle, baseline, eval, asked, count, tick, on)
    except AfqError as error:
        if junit:
            write_text(junit, junit_error(error))
        if annotated:
            note(annotate.error_annotation(error))
            if left_out := annotate.append_summary(f"## REFUSED\n\n{error}\n", os.environ):
                note(left_out)
        raise
    if junit:  # first: what fails here must not follow a whole document on standard output
        write_text(junit, junit_text(report))
    emit(text(report), report, as_json)
    if annotated:
        say(annotate.workflow_commands(report))
        if left_out := annotate.append_summary(markdown(report), os.environ):
            say(left_out)
    raise typer.Exit(0 if report.verdict == "pass" else 1)
