"""`afq-export targets`."""

from __future__ import annotations

from typing import Annotated

import typer

from afq_export.commands.options import Json, target_names
from afq_export.terminal import emit

app = typer.Typer(name="targets", help="Deployment targets: what a device's kernels accept.")


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """Name, status and runtime of every shipped target."""
    from afq_export.report.tables import Table
    from afq_export.spec.catalog import load_target

    profiles = [load_target(name) for name in target_names()]
    rows = tuple((p.name, p.status, p.runtime, p.default_recipe, p.description) for p in profiles)
    data = [{"name": p.name, "status": p.status, "runtime": p.runtime, "description": p.description} for p in profiles]
    emit(Table(("target", "status", "runtime", "default recipe", "description"), rows).text(), data, as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|TOML", autocompletion=target_names)], as_json: Json = False
) -> None:
    """A target as TOML, every default written out."""
    from afq_export.spec.catalog import load_target
    from afq_export.spec.strict import to_toml

    profile = load_target(name)
    emit(to_toml(profile).rstrip(), profile, as_json)
