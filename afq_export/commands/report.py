"""`afq-export report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afq_export.commands.options import Json
from afq_export.terminal import emit


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle or a run folder.")],
    other: Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help="A second one, to compare with.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="HTML", help="Page to write; the Markdown goes beside it (default: beside the bundle)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what was measured as one HTML page that needs no network, and as Markdown.

    With a second bundle the two stand side by side: figures, settings that differ, layer by layer.
    """
    from afq_export.errors import InputError
    from afq_export.files import write_text
    from afq_export.paths import bundle_folder
    from afq_export.report import page
    from afq_export.report.compare import open_subject

    folders = [bundle_folder(path) for path in (bundle, other) if path]
    usual = folders[0].resolve().parent / "report.html" if other is None else Path("comparison.html")
    path = out or usual
    if path.suffix not in (".html", ".htm"):
        raise InputError("not a name for a page", where=str(path), do="end it in .html")
    if path.resolve().parent in {folder.resolve() for folder in folders}:
        raise InputError("the page would lie in the bundle", where=str(path), why="its manifest lists what it ships")
    subjects = [open_subject(folder) for folder in folders]
    written = {path: page.html(subjects), path.with_suffix(".md"): page.markdown(subjects)}
    for file, text in written.items():
        write_text(file, text)
    emit("\n".join(map(str, written)), {"written": [str(file) for file in written]}, as_json)
