"""`afq-export sensitivity`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from afq_export.commands.options import Calib, Json, Model, Recipe, Seed, Set, Target, Threads, Tiny
from afq_export.errors import InputError
from afq_export.spec.request import Request
from afq_export.terminal import emit, note, progress


def command(
    target: Target = "android-xnnpack",
    model: Model = None,
    recipe: Recipe = None,
    changes: Set = None,
    calib: Calib = None,
    budget_mb: Annotated[
        float | None,
        typer.Option(
            metavar="MB", help="Bytes of the program, in 10^6, as `plan` counts them (default: those of the recipe)."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Linears that keep the recipe's grid, e.g. 'blocks.0.*'; lm_head, embed_tokens; may be repeated.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="TOML", help="Where the suggested recipe is written, for `run --recipe`.")
    ] = None,
    seed: Seed = 0,
    tiny: Tiny = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """What every linear costs on every grid that the target has, and the recipe that spends a size budget best.

    One pass forward and one back over the calibration text (samples.windows of samples.length tokens). A linear that
    an override of the recipe gives a grid keeps it.
    """
    if budget_mb is not None and not 0 < budget_mb < float("inf"):
        raise InputError("no budget", where=f"--budget-mb {budget_mb:g}", do="give megabytes above 0")
    if out is not None and out.suffix != ".toml":
        raise InputError("a recipe's file ends in .toml", where=f"--out {out}")
    from afq_export.commands.stages import say_defaults
    from afq_export.files import refuse_unwritable, write_text
    from afq_export.job import prepare
    from afq_export.machine import settle
    from afq_export.sensitivity.analyse import answer, ask, recipe_text
    from afq_export.sensitivity.report import text

    if out is not None:
        refuse_unwritable(out)
    job = prepare(
        Request(
            target=target, model=model, recipe=recipe, changes=tuple(changes or ()), calib=calib, seed=seed, tiny=tiny,
            threads=threads,
        )
    )  # fmt: skip
    question = ask(job, None if budget_mb is None else round(budget_mb * 1e6), tuple(keep or ()))
    say_defaults(job)
    settle(job.threads)
    with progress() as tick:
        found = answer(question, out.stem if out else None, tick)
    if out is not None:
        write_text(out, recipe_text(found))
    emit(text(found), found, as_json)
    if found.most <= found.budget:
        note(f"no program takes more than {found.most / 1e6:.2f} MB: everything has the grid that costs least")
    following = f"next: afq-export run --target {shlex.quote(target)} --recipe {shlex.quote(str(out))}"
    note(following if out else "write the suggestion with --out RECIPE.toml")
