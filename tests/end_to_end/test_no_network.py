"""Nothing leaves the machine unless it was asked for: whole runs, in a process that may open no connection."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

BLOCKED = """
import json, os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"):
        if event.startswith("socket.get") or not isinstance(arguments[1], str):  # a str is a Unix socket's path
            print("NETWORK", event, arguments, file=sys.stderr, flush=True)
            os._exit(99)

sys.addaudithook(watch)
from afq_export.cli import call
for line in json.loads(sys.argv[1]):
    code = call(line)
    if code:
        print(line, file=sys.stderr)
        sys.exit(code)
"""
SMALL = ("--tiny", "--threads", "1", "--recipe", "w8a8-dynamic+rtn")


def blocked(folder: Path, *lines: list[str]) -> subprocess.CompletedProcess[str]:
    """Command lines of afq-export, one after the other, where Python's sockets end the process; and, where this may be
    done, the kernel has no network either, for what is not Python."""
    command = [sys.executable, "-c", BLOCKED, json.dumps(lines)]
    apart = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") and not subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        command = [*apart, *command]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_runs_and_what_uses_them(tmp_path: Path) -> None:
    """Both kinds of program on the demo model, and the commands on their bundles."""
    done = blocked(
        tmp_path,
        ["plan", "--tiny"],
        ["run", "--target", "android-xnnpack", *SMALL, "--out", "one"],
        ["run", "--target", "linux-x64-ort", *SMALL, "--out", "two"],
        ["generate", "two/bundle", "--prompt", "Once", "--tokens", "2"],
        ["baseline", "create", "two", "--out", "two.afqb", "--windows", "2", "--window", "64"],
        ["check", "two", "--baseline", "two.afqb"],
        ["report", "two", "--out", "two.html"],
        ["doctor"],
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_block_works(tmp_path: Path) -> None:
    """A hub id is a connection that was asked for: it is tried, and seen."""
    done = blocked(tmp_path, ["plan", "--model", "nobody/no-such-model"])
    assert done.returncode == 99 and "NETWORK socket." in done.stderr
