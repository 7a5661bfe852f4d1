"""`afq-export inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afq_export.commands.options import Json
from afq_export.terminal import emit


def command(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Bundle, run folder, checkpoint, .pte, .onnx, .xml, .gguf or model.")
    ],
    as_json: Json = False,
) -> None:
    """Say what something is, check the digests it carries, list its linears with grids and kernels."""
    from afq_export.paths import kind_of

    kind = kind_of(Path(path))
    from afq_export.commands import describe

    facts = describe.thing(Path(path), kind)
    emit(facts.text(), facts, as_json)
