"""`afq-export targets`."""

from __future__ import annotations

from typing import Annotated

import typer

from afq_export.commands.options import Json, target_names
from afq_export.terminal import emit

app = typer.Typer(name="targets", help="Deployment targets: what a device's kernels accept.")


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """Status, runtime, what each shipped target accepts and needs, and whether that is on this machine.

    `w4 group a8 dynamic`: 4-bit weights with a scale per group of inputs, int8 activations quantized at run time.
    """
    from afq_export.report.tables import Table
    from afq_export.report.targets import target_line
    from afq_export.spec.catalog import load_target

    lines = [target_line(load_target(name)) for name in target_names()]
    rows = tuple(
        (
            line.name,
            line.status,
            f"{line.runtime}, {line.backend}",
            f"no: {', '.join(line.missing)}" if line.missing else "yes",
            ", ".join(line.needs) or "nothing",
            "; ".join(line.accepts),
        )
        for line in lines
    )
    emit(Table(("target", "status", "runtime, backend", "here", "needs", "accepts"), rows).text(), lines, as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|TOML", autocompletion=target_names)], as_json: Json = False
) -> None:
    """A target as TOML, every default written out."""
    from afq_export.spec.catalog import load_target
    from afq_export.spec.strict import to_toml

    profile = load_target(name)
    emit(to_toml(profile).rstrip(), profile, as_json)
