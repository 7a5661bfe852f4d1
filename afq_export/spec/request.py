"""What the user asked for, as typed, without anything opened; the commands build it without importing torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from afq_export.spec.strict import convert


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for. None: the default (the demo model, the target's recipe, the demo corpora).

    `eval_windows` None: 40 evenly spaced windows; 0: all. `window`: tokens of an evaluation window. `threads` None:
    as many as this process may use; the last bits of what is learned depend on their number. `shards` None: as many as
    there are processes (calibrate/shards.py). `activation_memory_mb` None: a quarter of the memory there is.
    `device`: what blocks are learned on, `auto` a GPU if there is one.
    """

    target: str = "android-xnnpack"
    model: str | None = None
    recipe: str | None = None
    changes: tuple[str, ...] = ()
    calib: str | None = None
    eval: str | None = None
    out: str | None = None
    seed: int = 0
    tiny: bool = False
    window: int | None = None
    eval_windows: int | None = None
    threads: int | None = None
    shards: int | None = None
    activation_memory_mb: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


def recorded_request(data: Mapping[str, Any]) -> Request:
    """The request that run.json holds; paths that were relative to the folder of that run are found from here."""
    fields = {field.name for field in dataclasses.fields(Request)}
    known = {key: value for key, value in data.items() if key in fields}
    known["changes"] = known.get("changes") or ()
    base = Path(str(data.get("cwd", ".")))
    for key in ("target", "model", "recipe", "calib", "eval"):
        name = known.get(key)
        if isinstance(name, str) and name and not os.path.exists(name) and os.path.exists(base / name):
            known[key] = str(base / name)
    return convert(known, Request, "run.json: request")
