"""`baseline` and `check` on the tiny run: what they print and write, their exit codes, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from afq_export.cli import call

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _no_workflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)


@pytest.fixture(scope="module")
def base(finished: Path, texts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline of the tiny run; not to be changed."""
    path = tmp_path_factory.mktemp("base") / "base.afqb"
    given = ["--eval", texts[1], "--window", "64", "--windows", "4", "--threads", "1"]
    assert call(["baseline", "create", str(finished), "--out", str(path), *given]) == 0
    return path


def check(finished: Path, base: Path, text: str, *more: str) -> list[str]:
    return ["check", str(finished), "--baseline", str(base), "--eval", text, "--threads", "1", *more]


def test_an_untouched_bundle_passes(finished: Path, base: Path, texts, tmp_path: Path, capfd):
    capfd.readouterr()
    junit = tmp_path / "out" / "check.xml"
    assert call(check(finished, base, texts[1], "--json", "--junit", str(junit), "--identical", "always")) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["verdict"], found["drift"]["value"], found["kl"], found["identical"]) == ("pass", 0, 0, 1)
    assert found["protocol"]["windows"] == 4 and found["differences"] == [] and found["worst"] == []
    assert {gate["status"] for gate in found["gates"]} == {"passed"}
    assert Xml.parse(junit).getroot().get("failures") == "0"
    assert call(check(finished / "bundle", base, texts[1])) == 0
    assert capfd.readouterr().out.startswith("PASS  ")


def test_the_figure_is_that_of_perplexity(finished: Path, base: Path, texts, capfd):
    capfd.readouterr()
    given = ["--eval", texts[1], "--window", "64", "--windows", "4", "--threads", "1", "--json"]
    assert call(["perplexity", str(finished), *given]) == 0
    measured = json.loads(capfd.readouterr().out)
    assert call(["baseline", "show", str(base), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["facts"]["perplexity"] == measured["perplexity"] and shown["protocol"] == measured["protocol"]
    assert shown["updates"] == [] and "tokens" not in shown and "first_nll" not in shown


def test_limits_that_nothing_meets(finished: Path, base: Path, texts, tmp_path: Path, capfd):
    """No growth at all is met, a loss of speed is measured and cannot be compared: that passes, and says so."""
    (tmp_path / "limits.toml").write_text("drift = 0.0\ntop1 = 1.0\nkl = 0.0\nsize = 0.0\n")
    given = ["--limits", str(tmp_path / "limits.toml"), "--slowdown", "50%", "--github"]
    capfd.readouterr()
    assert call(check(finished, base, texts[1], *given)) == 0
    out = capfd.readouterr().out
    assert "speed             skipped  the baseline has no speed" in out
    assert "::notice title=afq-export check%3A speed skipped::the baseline has no speed" in out


def test_an_update_is_recorded(finished: Path, base: Path, texts, tmp_path: Path, capfd):
    own = Path(shutil.copy(base, tmp_path / "own.afqb"))
    given = ["--eval", texts[1], "--threads", "1", "--who", "Ada", "--what", "the runtime", "--why", "it is newer"]
    assert call(["baseline", "update", str(finished), "--baseline", str(own), *given]) == 0
    capfd.readouterr()
    assert call(["baseline", "show", str(own)]) == 0
    out = capfd.readouterr().out
    for part in ("Ada", "the runtime", "it is newer", "+0.00% ± 0.00%", "100.00%"):
        assert part in out
    assert call(check(finished, own, texts[1])) == 0


def test_with_speed(finished: Path, texts, tmp_path: Path, capfd):
    own = tmp_path / "own.afqb"
    given = ["--eval", texts[1], "--window", "64", "--windows", "2", "--threads", "1", "--speed"]
    assert call(["baseline", "create", str(finished), "--out", str(own), *given]) == 0
    capfd.readouterr()
    assert call(check(finished, own, texts[1], "--slowdown", "99%", "--json")) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["speed"]["decode"] > 0
    assert next(gate for gate in found["gates"] if gate["name"] == "speed")["status"] == "passed"


def test_what_is_not_alike_is_refused(refused: Refused, finished: Path, base: Path, texts, tmp_path: Path):
    junit = tmp_path / "check.xml"
    line = refused(*check(finished, base, texts[0], "--junit", str(junit)))
    assert line.startswith("perplexities of different protocols cannot be compared: digest was ")
    case = Xml.parse(junit).getroot().find("testsuite/testcase/error")
    assert case is not None and case.text == line.removeprefix("error: ")
    line = refused("check", str(finished), "--baseline", str(base))
    assert line == "which text? [eval.txt]: it is not a shipped one; name it with --eval"
    update = ["baseline", "update", str(finished), "--baseline", str(base), "--who", "a", "--what", "b", "--why", "c"]
    assert refused(*update, "--eval", texts[0]).startswith("perplexities of different protocols cannot be compared")


def test_what_is_missing_or_empty_is_refused(refused: Refused, finished: Path, base: Path, texts, tmp_path: Path):
    before = base.read_bytes()
    update = ["baseline", "update", str(finished), "--baseline", str(base), "--eval", texts[1], "--threads", "1"]
    assert refused(*update, "--who", "a", "--what", "b").startswith("Missing option '--why'")
    line = refused(*update, "--who", "a", "--what", "", "--why", "c")
    assert line == "an update says who, what and why: --what is empty"
    create = ["baseline", "create", str(finished), "--out"]
    assert refused(*create, str(base)).startswith(f"there is a baseline already [{base}]")
    assert refused(*create, str(tmp_path / "new"), "--eval", texts[1], "--windows", "1").startswith("too few windows")
    assert refused(*create, str(tmp_path / "new"), "--window", "2").startswith("window does not fit")
    assert refused("baseline", "show", texts[0]).startswith(f"not a baseline [{texts[0]}]")
    assert refused(*check(finished, tmp_path / "none", texts[1])).startswith("cannot read the baseline")
    assert refused(*check(finished, base, texts[1], "--drift", "much")).startswith("cannot read a limit")
    assert refused(*check(finished, base, texts[1], "--limits", "none.toml")).startswith("cannot read file [none.toml]")
    assert base.read_bytes() == before and list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_measuring(
    refused: Refused, finished: Path, base: Path, texts, tmp_path: Path
):
    """A missing baseline and a broken bundle would be said next: neither was looked at."""
    (tmp_path / "file").write_text("")
    unwritable = str(tmp_path / "file" / "check.xml")
    assert refused(*check(finished, tmp_path / "none", texts[1], "--junit", unwritable)).startswith("cannot write [")
    create = ["baseline", "create", str(tmp_path / "none"), "--out", str(tmp_path)]
    assert refused(*create).startswith("there is a baseline already")
    assert refused(*create[:-1], unwritable).startswith("cannot write [")


def test_a_runner_without_a_device_is_refused(refused: Refused, finished: Path, base: Path, texts):
    line = refused(*check(finished, base, texts[1], "--runner", "own"))
    assert line == "--runner is for a device [own]; name one with --device"
    assert refused("validate", str(finished), "--runner", "own").startswith("--runner is for a device [own]")
    made = ["baseline", "create", str(finished), "--out", str(base) + ".new", "--runner", "own"]
    assert refused(*made).startswith("--runner is for a device [own]")


def test_one_document_and_the_verdict_whatever_the_summary(
    finished: Path, base: Path, texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "summary.md"))
    capfd.readouterr()
    assert call(check(finished, base, texts[1], "--json", "--github")) == 0
    out = capfd.readouterr()
    assert json.loads(out.out)["verdict"] == "pass" and "no step summary::cannot write" in out.err


def test_a_changed_file_and_a_truncated_baseline(refused: Refused, finished: Path, base: Path, texts, tmp_path: Path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "bundle" / "config.json").write_text("{}")
    assert refused(*check(run, base, texts[1])).startswith("a file of the bundle was changed")
    short = Path(shutil.copy(base, tmp_path / "short.afqb"))
    os.truncate(short, short.stat().st_size // 2)
    assert refused(*check(finished, short, texts[1])) == f"the baseline is damaged [{short}]: it is truncated"


def test_without_the_runtime(refused: Refused, finished: Path, base: Path, texts, monkeypatch: pytest.MonkeyPatch):
    from afq_export.backends import xnnpack
    from afq_export.errors import MissingToolError

    def missing(bundle):
        raise MissingToolError("a runtime is missing", where="executorch")

    monkeypatch.setattr(xnnpack, "open_session", missing)
    assert refused(*check(finished, base, texts[1]), code=3).startswith("a runtime is missing")


def test_too_few_tokens_are_no_pass(finished: Path, base: Path, texts, monkeypatch: pytest.MonkeyPatch, capfd):
    """Losses that scatter around the limit: exit code 1, an annotation, and how many tokens it would take."""
    import torch

    from afq_export.guard import record

    def scattered(session, ids_NT, progress):
        stats = measured(session, ids_NT, progress)
        noise = torch.randn(len(ids_NT), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.01
        return type(stats)(stats.nll + noise + 0.004, stats.top1)

    measured = record.measure_one
    monkeypatch.setattr(record, "measure_one", scattered)
    capfd.readouterr()
    assert call(check(finished, base, texts[1], "--github")) == 1
    out = capfd.readouterr().out
    assert out.startswith("INCONCLUSIVE  ") and "not enough tokens (252), need about " in out
    assert "::error title=afq-export check%3A drift inconclusive::" in out
