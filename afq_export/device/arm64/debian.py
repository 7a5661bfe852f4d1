"""Debian packages of any suite and architecture, through this machine's apt and mirror, without installing anything.

apt keeps its state in a folder of ours and starts from an empty system, so it resolves whole dependencies; it checks
the suite's signature and every package's digest itself. No root is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from afq_export.device.tools import require, run
from afq_export.errors import MissingToolError


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of a mirror for one architecture; `state` is apt's folder."""

    name: str
    architecture: str
    state: Path

    def download(self, packages: Sequence[str], *, dependencies: bool) -> list[Path]:
        """The .deb files of `packages`, with all that they depend on or alone. Raises MissingToolError."""
        what = f"cannot download {', '.join(packages)} of Debian {self.name}"
        archives = self.state / "archives"
        if dependencies:
            options = ("--yes", "--no-install-recommends", "--download-only")
            run(["apt-get", *self.options(), "install", *options, *packages], what)
        else:
            run(["apt-get", *self.options(), "download", *packages], what, folder=archives)
        found = sorted(archives.glob("*.deb"))
        if not found:
            raise MissingToolError(what, why="apt-get gave no file")
        return found

    def options(self) -> list[str]:
        """What makes apt-get use this suite and `state` only."""
        settings = {
            "APT::Architecture": self.architecture,
            "APT::Architectures": self.architecture,
            "APT::Sandbox::User": "root",  # the folder is the user's: apt must not step down to one that cannot write
            "APT::Update::Error-Mode": "any",
            "Dir::State": self.state,
            "Dir::State::status": self.state / "status",
            "Dir::State::lists": self.state / "lists",
            "Dir::Cache": self.state,
            "Dir::Cache::archives": self.state / "archives",
            "Dir::Etc::sourcelist": self.state / "sources.list",
            "Dir::Etc::sourceparts": self.state / "none",
        }
        return ["-qq"] + [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


def open_suite(name: str, architecture: str, state: Path) -> Suite:
    """The suite from the first of this machine's mirrors that has it. Raises MissingToolError when none does."""
    require("apt-get", "gets the packages that the emulation is made of; it is part of Debian and Ubuntu")
    require("dpkg-deb", "unpacks the packages that the emulation is made of")
    for folder in ("lists/partial", "archives/partial", "none"):
        (state / folder).mkdir(parents=True)
    (state / "status").touch()
    suite, failures = Suite(name, architecture, state), []
    for mirror in mirrors():
        (state / "sources.list").write_text(f"deb [arch={architecture}] {mirror} {name} main\n", encoding="utf-8")
        try:
            run(["apt-get", *suite.options(), "update"], "no such suite")
        except MissingToolError as error:
            failures.append(error.why)
        else:
            return suite
    raise MissingToolError(
        f"no package source of this machine has Debian {name}",
        why=failures[-1] if failures else "apt-get knows no source with a component main",
        do="add a Debian mirror to /etc/apt/sources.list.d",
    )


def mirrors() -> list[str]:
    """Addresses of this machine's package sources that have a component main, in apt's order."""
    lines = run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(COMPONENT)"], "apt-get does not list its sources"
    )
    found = (line.rpartition(" ") for line in lines.splitlines())
    return list(dict.fromkeys(address for address, _, component in found if component == "main"))


def machine_architecture() -> str:
    """Debian's name of this machine's architecture, e.g. amd64."""
    require("dpkg", "tells Debian's name of this machine's architecture")
    return run(["dpkg", "--print-architecture"], "dpkg does not know this machine").strip()


def unpack(packages: Sequence[Path], folder: Path) -> None:
    """The files of .deb packages under `folder`; no script of theirs runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        run(["dpkg-deb", "--extract", package, folder], f"cannot unpack {package.name}")
