"""`afq-export doctor`."""

from __future__ import annotations

import typer

from afq_export.commands.options import Json
from afq_export.terminal import emit


def command(as_json: Json = False) -> None:
    """Versions against the tested ones, missing tools with the line that installs them, and the machine.

    Exit code 3 when something is missing that the target android-xnnpack needs.
    """
    from afq_export.doctor import diagnose

    found = diagnose()
    emit(_text(found), found, as_json)
    raise typer.Exit(0 if found.ready else 3)


def _text(found) -> str:
    from afq_export.report.tables import Table

    packages = (found.python, *found.packages)
    rows = tuple((p.name, p.tested, p.found, p.status, "" if p.status == "ok" else p.install) for p in packages)
    targets = tuple((t.target, ", ".join(t.missing) or "nothing", t.install) for t in found.targets)
    machine = found.machine
    memory = "unknown" if machine.memory_mb is None else f"{machine.memory_mb / 1000:.1f} GB"
    lines = {
        "system": machine.system,
        "processor": f"{machine.cpu}, {machine.cores} cores",
        "memory": memory,
        "instructions": " ".join(machine.flags) or "unknown",
    }
    return "\n\n".join(
        (
            Table(("package", "tested", "found", "status", "do"), rows).text(),
            Table(("target", "missing", "do"), targets).text(),
            "\n".join(f"{name.ljust(12)}  {value}" for name, value in lines.items()),
            "ready" if found.ready else "not ready: see the lines under `do`",
        )
    )
