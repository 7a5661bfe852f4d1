"""Strict reading of TOML files into frozen structs (msgspec): unknown keys and wrong types name file and key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli_w

from afq_export.errors import InputError

T = TypeVar("T")

MAX_TOML_BYTES = 1 << 20
"""A recipe, target or corpus file beyond 1 MiB is not one; it is refused before it is parsed."""
MAX_DOTS = 200
"""Dots in a line of TOML: the parser's time grows with the square of a key's parts, to hours for a file full of one."""


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every spec struct: immutable, closed (an unknown key is an error)."""


def read_toml(path: Path) -> dict[str, Any]:
    """The parsed TOML of `path`. Raises InputError when it cannot be read or parsed."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOML_BYTES + 1)
        if len(data) > MAX_TOML_BYTES:
            raise InputError("file too large", where=str(path), why=f"more than {MAX_TOML_BYTES} bytes of TOML")
        if max(line.count(b".") for line in data.split(b"\n")) > MAX_DOTS:
            raise InputError("not valid TOML", where=str(path), why=f"a line with more than {MAX_DOTS} dots")
        return tomllib.loads(data.decode().replace("\r\n", "\n"))
    except OSError as error:
        raise InputError("cannot read file", where=str(path), why=error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:  # syntax, UTF-8, and integers of more digits than Python takes
        raise InputError("not valid TOML", where=str(path), why=_first_line(error) or "nested too deeply") from error


def convert(data: Any, kind: type[T], where: str) -> T:
    """`data` as an instance of `kind`; `where` names its origin in the error."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise InputError("does not fit", where=where, why=str(error), do=_hint(kind, str(error))) from error
    except RecursionError as error:
        raise InputError("does not fit", where=where, why="nested too deeply") from error


def to_toml(data: Data) -> str:
    """`data` as TOML, every default written out, what is None left out (TOML has no null): it reads back the same."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(data)))


def flat(prefix: str, value: Any) -> dict[str, str]:
    """Nested data as `prefix.key.key` -> text."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(f"{prefix}.{key}", item).items()}
    return {prefix: str(value)}


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def _hint(kind: type, message: str) -> str:
    """The keys that there are, when the message is about an unknown one at the top level."""
    fields = getattr(kind, "__struct_fields__", ())
    return f"known keys here: {', '.join(fields)}" if "unknown field" in message and "at `" not in message else ""
