"""`afq-export perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afq_export.commands.options import Count, Eval, Json, Threads, Window, window_count
from afq_export.terminal import emit, progress


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|BUNDLE", help="A model of any form, a bundle, or a quantized checkpoint.")
    ],
    eval: Eval = None,
    window: Window = None,
    windows: Count = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="JSON", help="A report.json, or what an earlier --json printed.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR", help="Tokenizer of a checkpoint that left its run folder.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, and say by which protocol; figures of different protocols are not compared.

    A bundle runs through its real runtime, a quantized checkpoint through fake quantization.
    """
    count = window_count(windows)
    from afq_export import perplexity as figures
    from afq_export.machine import default_threads, settle
    from afq_export.validate.ladder import protocol_of

    settle(threads or default_threads())
    earlier = figures.read_earlier(compare) if compare else None
    subject = figures.open_subject(model, tokenizer)
    cut = figures.windows_for(subject, eval, window, count)
    if earlier:
        figures.refuse_other_protocol(earlier.protocol, protocol_of(cut))
    with progress() as tick:
        measured = figures.measure(subject, cut, tick)
    emit(_text(measured, figures.comparison_table(measured, earlier).text() if earlier else ""), measured, as_json)


def _text(measured, comparison: str) -> str:
    """The figure, every part of its protocol, and the comparison."""
    figure, p = measured.perplexity, measured.protocol
    lines = {
        "perplexity": f"{figure.value:.4f} ± {figure.stderr:.4f} ({figure.tokens} tokens predicted)",
        "of": f"{measured.name} ({measured.rung.replace('_', '-')})",
        "corpus": f"{p.corpus}, sha256 {p.digest}",
        "windows": f"{p.windows} of {p.windows_in_corpus}, {p.window} tokens each, stride {p.stride}",
        "BOS": "yes" if p.bos else "no",
        "tokenizer": f"sha256 {p.tokenizer_digest}",
    }
    text = "\n".join(f"{name.ljust(10)}  {value}" for name, value in lines.items())
    return f"{text}\n\n{comparison}" if comparison else text
