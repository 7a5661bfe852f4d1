"""Where recipes, targets and corpora are found: a path, then the checkout, then the copy shipped in the wheel."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import Any

from afq_export.errors import InputError
from afq_export.spec.corpus import CorpusSpec
from afq_export.spec.recipe import Recipe
from afq_export.spec.strict import convert, read_toml
from afq_export.spec.target import TargetProfile

_PACKAGE = Path(__file__).resolve().parents[1]
SCHEMES, METHODS = "calib/recipes/schemes", "calib/recipes/methods"
TARGETS, CORPORA = "targets", "calib/corpora"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A shipped file: its name on the command line and what it says of itself."""

    name: str
    description: str
    path: Path


def data_root() -> Path:
    """The checkout when the package lies in one, else the data shipped inside the package."""
    checkout = _PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").exists() and (checkout / TARGETS).is_dir() else _PACKAGE / "data"


def demo_model(family: str = "llama") -> Path:
    """Folder of an embedded demo model: `llama` or `opt`."""
    return data_root() / "examples" / "demo" / family


def entries(folder: str) -> list[Entry]:
    """The shipped files of one kind, by name."""
    found = []
    for path in sorted((data_root() / folder).glob("*.toml")):
        found.append(Entry(path.stem, str(read_toml(path).get("description", "")), path))
    return found


def load_target(name: str) -> TargetProfile:
    """A shipped target's name or the path of a TOML file. Raises InputError with the names there are.

    A file may start from a shipped one with `base = "linux-arm64-ort"` and change any field.
    """
    path = _find(name, TARGETS, "target")
    return convert(_on_base(read_toml(path), str(path)), TargetProfile, str(path))


def load_recipe(name: str, changes: tuple[str, ...] = ()) -> Recipe:
    """`scheme`, `scheme+method` or a TOML path, with `key.field=value` changes applied (values in TOML syntax).

    A TOML recipe may start from shipped ones: `scheme = "w4a8-g32"`, `method = "omniquant"`. Raises InputError.
    """
    if _is_path(name):
        path = Path(name)
        own = read_toml(path)
        scheme, method = _named(own, "scheme", name), _named(own, "method", name)
        own.setdefault("name", path.stem)
        where = str(path)
    else:
        scheme, _, method = name.partition("+")
        own, where = {"name": name}, f"recipe {name}"
    data: dict[str, Any] = {}
    if scheme:
        data = read_toml(_find(scheme, SCHEMES, "recipe"))
        method = method or data.pop("method", None)
        data.pop("method", None)
    if method:
        learned = read_toml(_find(method, METHODS, "method"))
        learned["description"] = "; ".join(filter(None, (data.get("description"), learned.get("description"))))
        data = _merged(data, learned)
    data = _merged(data, own)
    for change in changes:
        data = _merged(data, _change(change))
    return convert(data, Recipe, where)


def load_corpus(name: str) -> tuple[CorpusSpec, Path] | Path:
    """A shipped corpus' name or a corpus TOML (spec and the folder its file is relative to), or a text file's path."""
    path = Path(name)
    if path.suffix != ".toml" and (path.is_file() or _is_path(name)):
        return path
    path = _find(name, CORPORA, "corpus")
    return convert(read_toml(path), CorpusSpec, str(path)), path.parent


def _on_base(data: dict[str, Any], where: str) -> dict[str, Any]:
    """`data` on top of the shipped target that it names as its base, if it does, and that on its own."""
    own = dict(data)
    base = _named(own, "base", where)
    if base is None:
        return own
    path = _shipped(base, TARGETS, "target")
    return _merged(_on_base(read_toml(path), str(path)), own)


def _named(data: dict[str, Any], key: str, where: str) -> str | None:
    """Takes the name of another file out of `data`. Raises InputError when it is no text."""
    name = data.pop(key, None)
    if name is not None and not isinstance(name, str):
        raise InputError("does not fit", where=where, why=f"{key} = {name!r} is not a name")
    return name


def _find(name: str, folder: str, kind: str) -> Path:
    if _is_path(name):
        if not Path(name).is_file():
            raise InputError(f"no such {kind}", where=name, why="there is no such file")
        return Path(name)
    return _shipped(name, folder, kind)


def _shipped(name: str, folder: str, kind: str) -> Path:
    """The file of a shipped name. A base is always one, so that no chain of files can be a circle."""
    path = data_root() / folder / f"{name}.toml"
    names = [p.stem for p in sorted(path.parent.glob("*.toml"))]
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(f"no such {kind}", where=name, do=f"{hint}there are: {', '.join(names)}")
    return path


def _is_path(name: str) -> bool:
    return name.endswith(".toml") or "/" in name or Path(name).is_file()


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, tables merged key by key."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _change(text: str) -> dict[str, Any]:
    """`learning.epochs=5` as a nested table; a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError("cannot read --set", where=text, do="write key.field=value, e.g. learning.epochs=5")
    for literal in (value, f'"{value}"'):
        try:
            return tomllib.loads(f"{key} = {literal}")
        except tomllib.TOMLDecodeError:
            continue
    raise InputError("cannot read --set", where=text, why="neither a TOML value nor a word")
