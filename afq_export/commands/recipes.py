"""`afq-export recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from afq_export.commands.options import Json, Set, recipe_names
from afq_export.terminal import emit

app = typer.Typer(name="recipes", help="Recipes: a scheme (bits and grids) and a method (transforms and learning).")


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """Every shipped scheme and method; write `scheme` or `scheme+method`."""
    from afq_export.report.tables import Table
    from afq_export.spec.catalog import METHODS, SCHEMES, entries

    found = {"scheme": entries(SCHEMES), "method": entries(METHODS)}
    tables = [Table((k, "description"), tuple((e.name, e.description) for e in v)).text() for k, v in found.items()]
    data = {f"{kind}s": [{"name": e.name, "description": e.description} for e in v] for kind, v in found.items()}
    emit("\n\n".join(tables), data, as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|TOML", autocompletion=recipe_names)],
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """A recipe as TOML, scheme, method and every default put together."""
    from afq_export.spec.catalog import load_recipe
    from afq_export.spec.strict import to_toml

    recipe = load_recipe(name, tuple(changes or ()))
    emit(to_toml(recipe).rstrip(), recipe, as_json)
