#!/usr/bin/env python3
"""The versions of matrix.toml, each combination in an environment of its own: install, doctor, two runs, some tests.

.ci/matrix.py                       all combinations
.ci/matrix.py lowest newest         some
.ci/matrix.py --list                their names as JSON, for a workflow
.ci/matrix.py --pins NAME           their versions, a line each, for `pip install -c`

With --work DIR the environments stay there and are used again. Minutes and 2 GB of disk each. Needs Python 3.11 and no
package. Exit code 1 when a step of a combination failed; the table at the end says which.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("matrix.toml")
MATTER = ("torch", "transformers", "onnx", "onnxruntime", "executorch")
"""Columns of the printed table."""
RUNS = (("android-xnnpack", "w4a8-g32"), ("linux-x64-ort", "w8a8-dynamic+awq"))
SMALL = ("--windows", "4", "--set", "samples.windows=4", "--set", "learning.epochs=1", "--threads", "1")


def combinations() -> dict[str, dict[str, str]]:
    """Name -> package -> version. A mixed one is `of` another with some packages as in `but`."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    found: dict[str, dict[str, str]] = dict(table["versions"])
    for name, mix in table["mixed"].items():
        found[name] = found[mix["of"]] | {package: found[mix["from"]][package] for package in mix["but"]}
    return found


def tests() -> list[str]:
    """The files and folders that are run in every environment."""
    return list(tomllib.loads(TABLE.read_text(encoding="utf-8"))["tests"])


def steps(environment: Path, constraints: Path, results: Path) -> dict[str, list[str]]:
    """What is done in an environment, in order: name -> command."""
    python, program = str(environment / "bin" / "python"), str(environment / "bin" / "afq-export")
    pip = [python, "-m", "pip", "install", "--quiet", "-c", str(constraints)]
    found = {
        "environment": [sys.executable, "-m", "venv", str(environment)],
        # Torch first: where a local CPU build of it exists it is taken, and the rest of the resolution keeps it.
        "torch": [*pip, "torch"],
        "install": [*pip, "-e", f"{ROOT}[dev]"],
        "doctor": [program, "doctor"],
    }
    for target, recipe in RUNS:
        options = ["--target", target, "--recipe", recipe, *SMALL, "--out", str(results / target), "--fresh"]
        found[target] = [program, "run", *options]
    # Old packages warn of what newer ones among their own dependencies have dropped; that is no failure of ours.
    return found | {"tests": [python, "-m", "pytest", "-q", "-W", "ignore::DeprecationWarning", *tests()]}


def run(name: str, versions: dict[str, str], work: Path) -> tuple[str, dict[str, float]]:
    """(the step that failed or "", seconds of each step). What commands say goes to `work`/NAME.log."""
    constraints, log = work / f"{name}.txt", work / f"{name}.log"
    constraints.write_text(pins(versions), encoding="utf-8")
    seconds: dict[str, float] = {}
    with log.open("w", encoding="utf-8") as file:
        for step, command in steps(work / name, constraints, work / f"{name}-runs").items():
            start = time.monotonic()
            file.write(f"== {step}: {' '.join(command)}\n")
            file.flush()
            quiet = {"stdout": file, "stderr": subprocess.STDOUT}
            failed = subprocess.run(command, cwd=ROOT, check=False, env=environ(), **quiet).returncode
            seconds[step] = time.monotonic() - start
            print(f"{name}: {step} {'failed' if failed else 'passed'} after {seconds[step]:.0f} s", flush=True)
            if failed or (step == "doctor" and other(work / name, versions, file)):
                print("\n".join(log.read_text(encoding="utf-8").splitlines()[-15:]), flush=True)
                return step, seconds
    return "", seconds


def other(environment: Path, versions: dict[str, str], file) -> bool:
    """Whether what is installed is not what the combination says; written to `file`."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    command = [str(environment / "bin" / "python"), "-c", code, *versions]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    pairs = zip(versions.items(), found, strict=True)
    wrong = [f"{name} is {here}, not {asked}" for (name, asked), here in pairs if here.partition("+")[0] != asked]
    file.write("\n".join(wrong) + "\n")
    file.flush()
    return bool(wrong)


def environ() -> dict[str, str]:
    """One thread, as the tests have it: results do not depend on how many cores a machine has."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def pins(versions: dict[str, str]) -> str:
    """A constraints file."""
    return "".join(f"{package}=={version}\n" for package, version in versions.items())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(given: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--pins", metavar="NAME")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args(given)
    known = combinations()
    wrong = [name for name in (*options.names, *([options.pins] if options.pins else ())) if name not in known]
    if wrong:
        parser.error(f"no combination {', '.join(wrong)}; there are {', '.join(known)}")
    if options.list:
        print(json.dumps(list(known)))
        return 0
    if options.pins:
        print(pins(known[options.pins]), end="")
        return 0
    rows, bad = [("combination", *MATTER, "result", "minutes")], False
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name in options.names or known:
            failed, seconds = run(name, known[name], work)
            bad = bad or bool(failed)
            result = f"FAILED at {failed}" if failed else "passed"
            rows.append((name, *(known[name][p] for p in MATTER), result, f"{sum(seconds.values()) / 60:.1f}"))
    print(f"Python {sys.version.split()[0]}\n{table(rows)}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
