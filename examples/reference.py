"""Writes the pages that are made from the program itself: the command reference and the tables of targets and recipes.

python examples/reference.py            writes them
python examples/reference.py --check    exit code 1 when one is not up to date (tests/commands does this)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from afq_export.cli import app
from afq_export.files import write_text
from afq_export.report.tables import Table
from afq_export.report.targets import long, needs
from afq_export.spec.catalog import METHODS, SCHEMES, TARGETS, entries, load_target

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- made by examples/reference.py -->", "<!-- end -->"


def main(arguments: list[str]) -> int:
    """Writes or checks; returns the exit code."""
    old = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in old:
        print(path.relative_to(ROOT))
        if "--check" not in arguments:
            write_text(path, pages()[path])
    return 1 if old and "--check" in arguments else 0


def pages() -> dict[Path, str]:
    """Every page and the text it should have."""
    targets, recipes = ROOT / "targets" / "README.md", ROOT / "calib" / "recipes" / "README.md"
    return {
        ROOT / "afq_export" / "commands" / "REFERENCE.md": reference(),
        targets: between_marks(targets.read_text(encoding="utf-8"), targets_table().markdown()),
        recipes: between_marks(recipes.read_text(encoding="utf-8"), recipes_tables()),
    }


def between_marks(page: str, made: str) -> str:
    """`page` with what stands between its marks replaced by `made`."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n\n{made}\n\n{END}{after}"


def targets_table() -> Table:
    """What each target accepts and needs."""
    rows = []
    for entry in entries(TARGETS):
        target = load_target(entry.name)
        accepts = "<br>".join(map(long, target.kernels))
        runtime = f"{target.runtime}, {target.backend}"
        stated = "<br>".join(source.replace(", http", ": http") for source in target.sources)
        needed = ", ".join(needs(target)) or "nothing"
        rows.append((f"`{target.name}`", target.status, runtime, accepts, needed, stated))
    return Table(("target", "status", "runtime, backend", "accepts", "needs", "stated by"), tuple(rows))


def recipes_tables() -> str:
    """Schemes and methods with what they say of themselves."""
    tables = []
    for title, folder in (("scheme", SCHEMES), ("method", METHODS)):
        rows = tuple((f"`{entry.name}`", entry.description) for entry in entries(folder))
        tables.append(Table((title, "what it is"), rows).markdown())
    return "\n\n".join(tables)


def reference() -> str:
    """Every command with its help, its arguments and its options."""
    root = typer.main.get_command(app)
    parts = ["# Commands", "Made by `examples/reference.py` from the program itself; do not edit.", root.help]
    parts += [f"{root.epilog}", options_table(root)]
    for path, command in commands(root, ("afq-export",)):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([*path, *(p.metavar for p in arguments), "[OPTIONS]"])
        parts += [f"## {' '.join(path)}", f"```\n{usage}\n```", command.help, options_table(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands that do something, groups opened, in the order of the help."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def options_table(command: Any) -> str:
    """A row per argument and option; empty when there is none."""
    rows = []
    for parameter in command.params:
        option = parameter.param_type_name == "option"
        if option and parameter.name in ("install_completion", "show_completion"):
            continue
        flag = option and parameter.is_flag
        names = ", ".join(f"`{name}`" for name in parameter.opts) if option else f"`{parameter.metavar}`"
        value = "" if flag or not option or not parameter.metavar else f" `{parameter.metavar}`"
        default = "" if parameter.default in (None, False) or parameter.required else f" (default: {parameter.default})"
        rows.append((names + value, (parameter.help or "") + default))
    return Table(("", "what it does"), tuple(rows)).markdown() if rows else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
