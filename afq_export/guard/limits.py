"""Limits of `check` from a TOML file and from options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afq_export.errors import InputError
from afq_export.spec.guard import Limits
from afq_export.spec.strict import convert, read_toml

WORDS = ("identical",)
"""Limits that are no number."""


def read_limits(path: Path | None, options: Mapping[str, str]) -> Limits:
    """The defaults, what the file at `path` says, and over both `options`, by name. Raises InputError."""
    data: dict[str, Any] = read_toml(path) if path else {}
    _refuse_nan(convert(data, Limits, str(path)), str(path))
    numbers = {name: text if name in WORDS else share(text, f"--{name}") for name, text in options.items()}
    limits = convert(data | numbers, Limits, " ".join(f"--{name} {text}" for name, text in options.items()))
    return limits


def share(text: str, where: str) -> float:
    """`0.5%` or `0.005` as 0.005. Raises InputError."""
    number, sign, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if sign else 1)
    except ValueError:
        value = math.nan
    if rest or math.isnan(value):
        raise InputError("cannot read a limit", where=f"{where} {text}", do="write 0.5%, 0.005 or inf")
    return value


def _refuse_nan(limits: Limits, where: str) -> None:
    """TOML can say nan, which no comparison ever passes or fails."""
    for name in limits.__struct_fields__:
        value = getattr(limits, name)
        if isinstance(value, float) and math.isnan(value):
            raise InputError("does not fit", where=where, why=f"{name} is no number")
