"""`afq-export generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afq_export.commands.options import Json, Threads
from afq_export.terminal import emit, note


def command(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle or a run folder.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message in the model's chat template.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a text, greedily, through the bundle's real runtime."""
    from afq_export.generate import generate
    from afq_export.lower.bundle import open_bundle
    from afq_export.machine import default_threads, settle
    from afq_export.paths import bundle_folder

    settle(threads or default_threads())
    result = generate(open_bundle(bundle_folder(Path(bundle))), prompt, tokens, chat=chat)
    emit(result.text if chat else result.prompt + result.text, result, as_json)
    speed = len(result.ids) / result.seconds if result.seconds else 0.0
    note(f"{result.prompt_tokens} tokens read, {len(result.ids)} written, {speed:.1f} a second")
