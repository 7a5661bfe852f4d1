"""Every option that more than one command takes, defined once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Literal

import typer

from afq_export.errors import InputError
from afq_export.spec.catalog import METHODS, SCHEMES, TARGETS, entries
from afq_export.spec.request import Request


def target_names() -> list[str]:
    """Shell completion of --target."""
    return [entry.name for entry in entries(TARGETS)]


def recipe_names() -> list[str]:
    """Shell completion of --recipe."""
    schemes = [entry.name for entry in entries(SCHEMES)]
    return schemes + [f"{scheme}+{method.name}" for scheme in schemes for method in entries(METHODS)]


Target = Annotated[
    str, typer.Option(metavar="NAME|TOML", help="Deployment target.", autocompletion=target_names, show_default=True)
]
Model = Annotated[
    str | None,
    typer.Option(metavar="DIR|ID|GGUF", help="Hugging Face folder, hub id or .gguf file (default: the demo model)."),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|TOML",
        help="Scheme or scheme+method, see `recipes list` (default: the target's).",
        autocompletion=recipe_names,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe field, e.g. learning.epochs=5; may be repeated."),
]
Calib = Annotated[
    str | None,
    typer.Option(metavar="NAME|TOML|TEXT", help="Text to calibrate on (default: the demo corpus)."),
]
Eval = Annotated[
    str | None,
    typer.Option(metavar="NAME|TOML|TEXT", help="Text to evaluate on (default: the demo corpus)."),
]
Out = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Run folder (default: afq-out/MODEL-TARGET-RECIPE)."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
BundlePath = Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle, or the run folder around it.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="A two-block random copy of the model: every stage in seconds.")]
Window = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Tokens of an evaluation window (default: 512, less if need be).")
]
Count = Annotated[
    str | None, typer.Option("--windows", metavar="N|all", help="Evaluation windows, evenly spaced (default: 40).")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Threads (default: all cores). Their number decides the last bits of what is learned."
    ),
]
ShardCount = Annotated[
    int | None,
    typer.Option(
        "--shards",
        min=1,
        metavar="N",
        help="Parts that every calibration step is cut into, for as many processes (default: one a process). "
        "Their number decides the last bits of what is learned.",
    ),
]
ActivationMemory = Annotated[
    int | None,
    typer.Option(
        "--activation-memory-mb",
        min=0,
        metavar="MB",
        help="Calibration activations beyond this go to files in the run folder (default: a quarter of the memory).",
    ),
]
Processor = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option("--device", help="What blocks are learned on; auto: a GPU if any.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove what an earlier run left in the run folder.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, also for errors.")]


def window_count(text: str | None) -> int | None:
    """--windows as a Request has it: None for the default, 0 for all. Raises InputError."""
    if text is None or text == "all":
        return None if text is None else 0
    if not text.isdecimal() or int(text) == 0:
        raise InputError("cannot read --windows", where=text, do="give a number from 1, or all")
    return int(text)


def takes_request(command: Callable[..., None]) -> Callable[..., None]:
    """`command(request, own options)` as a function that takes the options of a Request followed by its own.

    `run`, `plan` and the stages differ in what they do with a Request, not in how one is made.
    """
    shared = inspect.signature(_request, eval_str=True).parameters
    own = {name: p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "request"}

    @functools.wraps(command)
    def with_options(**given: object) -> None:
        request = _request(**{name: given.pop(name) for name in shared})
        command(request, **given)

    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*shared.values(), *own.values())]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    del with_options.__wrapped__  # type: ignore[attr-defined]
    return with_options


def _request(
    target: Target = "android-xnnpack",
    model: Model = None,
    recipe: Recipe = None,
    changes: Set = None,
    calib: Calib = None,
    eval: Eval = None,
    out: Out = None,
    seed: Seed = 0,
    tiny: Tiny = False,
    window: Window = None,
    windows: Count = None,
    threads: Threads = None,
    shards: ShardCount = None,
    activation_memory_mb: ActivationMemory = None,
    device: Processor = "auto",
) -> Request:
    return Request(
        target=target,
        model=model,
        recipe=recipe,
        changes=tuple(changes or ()),
        calib=calib,
        eval=eval,
        out=out,
        seed=seed,
        tiny=tiny,
        window=window,
        eval_windows=window_count(windows),
        threads=threads,
        shards=shards,
        activation_memory_mb=activation_memory_mb,
        device=device,
    )
