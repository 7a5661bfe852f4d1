"""`afq-export doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from afq_export.commands.options import Json
from afq_export.terminal import emit, note


def command(
    install: Annotated[
        str | None, typer.Option("--install", metavar="arm64", help="Set up what emulates ARM processors, then report.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Versions against the tested ones, missing tools with the line that installs them, and the machine.

    `--install arm64` puts an emulator, Python, both runtimes and runners for 64-bit ARM into $AFQ_CACHE (else
    ~/.cache/afq-export), from this machine's own package sources; nothing is installed system-wide. Exit code 3 when
    that cannot be had, or something is missing that the target android-xnnpack needs.
    """
    from afq_export.doctor import diagnose
    from afq_export.doctor import install as set_up

    if install:
        note(f"{install} is set up in {set_up(install, note)}")
    found = diagnose()
    emit(_text(found), found, as_json)
    if found.untested:
        note(f"warning: an untested combination: {found.untested}; every run still compares its file with `==`")
    raise typer.Exit(0 if found.ready else 3)


def _text(found) -> str:
    from afq_export.report.tables import Table

    packages = (found.python, *found.packages)
    rows = tuple((p.name, p.tested, p.found, p.status, "" if p.status == "ok" else p.install) for p in packages)
    targets = tuple((t.target, ", ".join(t.missing) or "nothing", t.install) for t in found.targets)
    extras = tuple((e.package, e.extra, e.found, e.licence, ", ".join(e.targets) or "none") for e in found.extras)
    devices = tuple((d.form, d.found, "; ".join(d.missing) or "nothing", d.do) for d in found.devices)
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
            Table(("package of some targets", "extra", "found", "licence", "targets"), extras).text(),
            Table(("device", "found", "missing", "do"), devices).text(),
            "\n".join(f"{name.ljust(12)}  {value}" for name, value in lines.items()),
            "ready" if found.ready else "not ready: see the lines under `do`",
        )
    )
