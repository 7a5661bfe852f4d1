"""The workflows of examples/ci: they parse, and their very command lines do what they are there for."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from afq_export.cli import call

yaml = pytest.importorskip("yaml")

CI = Path(__file__).parents[2] / "examples" / "ci"
CREATE = 'afq-export baseline create run --out "$BASELINE" --eval "$TEXT"'


def github() -> tuple[Mapping[str, str], dict[str, list[str]]]:
    """Variables and the commands by job."""
    data = yaml.safe_load((CI / "github-actions.yml").read_text(encoding="utf-8"))
    assert set(data[True]) == {"push", "pull_request", "workflow_dispatch"}, "YAML 1.1 reads `on` as true"
    assert data["permissions"] == {"contents": "read"}
    jobs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in data["jobs"].items()}
    assert all("${{" not in command for commands in jobs.values() for command in commands), "no text runs as a command"
    return data["env"], jobs


def gitlab() -> tuple[Mapping[str, str], dict[str, list[str]]]:
    data = yaml.safe_load((CI / "gitlab-ci.yml").read_text(encoding="utf-8"))
    assert data["check"]["artifacts"]["reports"] == {"junit": "afq-check.xml"}
    assert data["check"]["artifacts"]["when"] == "always"
    return data["variables"], {name: data[name]["script"] for name in ("check", "accept")}


FILES = {"github-actions.yml": github, "gitlab-ci.yml": gitlab}
RUNNER = {"WHO": "someone", "WHAT": "nothing", "WHY": "to see it", "GITLAB_USER_NAME": "someone"}


def words(command: str, environment: Mapping[str, str]) -> list[str]:
    """The arguments that a shell gives `afq-export` for a line of a workflow."""
    spy = 'afq-export() { printf "%s\\0" "$@"; }; ' + command
    done = subprocess.run(["bash", "-e", "-u", "-c", spy], env=dict(environment), capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("name", FILES)
def test_the_command_lines_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Export, baseline, check, accept: as the shell reads them, with the file's own variables, on a tiny model."""
    variables, jobs = FILES[name]()
    given = {**variables, **RUNNER, "EXPORT": f"{variables['EXPORT']} --target linux-x64-ort --tiny --threads 1"}
    summary = tmp_path / "summary.md"
    monkeypatch.chdir(tmp_path)
    if name.startswith("github"):
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))

    def run(command: str, *more: str, **changes: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = call([*words(command, given | changes), *more])
        return code, *capfd.readouterr()

    export, check = (command for command in jobs["check"] if command.startswith("afq-export"))
    assert CREATE in (CI / name).read_text(encoding="utf-8")
    assert run(export)[0] == 0
    assert run(CREATE, "--window", "64")[0] == 0  # a random model says as much on short windows
    code, out, _ = run(check)
    assert code == 0
    suite = Xml.parse("afq-check.xml").getroot()[0]
    assert suite.get("failures") == suite.get("errors") == "0" and int(suite.get("tests", "0")) >= 6
    if name.startswith("github"):
        assert "::notice title=afq-export check::PASS" in out
        assert summary.read_text(encoding="utf-8").startswith("## PASS")
    code, out, _ = run(next(command for command in jobs["accept"] if "baseline update" in command))
    assert code == 0 and "someone  nothing  to see it" in out
    code, _, err = run(check, BASELINE="none.afqb")
    assert code == 2
    assert Xml.parse("afq-check.xml").getroot()[0].get("errors") == "1"
    assert ("::error title=afq-export check::cannot read the baseline [none.afqb]" in err) == name.startswith("github")


def test_both_say_the_same() -> None:
    """One set of limits, one way to check and to accept."""

    def commands(jobs: Mapping[str, Any]) -> Iterator[str]:
        for job in jobs.values():
            yield from (c.replace("$GITLAB_USER_NAME", "$WHO") for c in job if c.startswith("afq-export"))

    (one, first), (two, second) = github(), gitlab()
    assert list(commands(first)) == list(commands(second))
    assert one["LIMITS"] == two["LIMITS"] and set(one) == set(two)
