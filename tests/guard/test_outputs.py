"""What CI servers and readers get: JUnit, GitHub's commands and pages, the terminal. Golden texts."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from afq_export.errors import InputError
from afq_export.guard import github
from afq_export.guard.junit import junit, junit_error
from afq_export.guard.text import baseline_text, markdown, text
from afq_export.spec.guard import Gate
from tests.guard.sample import baseline, report

TEXT = """\
FAIL  demo  w8a8-dynamic  linux-x64-ort  (drift, cumulative drift)

gate              status        detail
drift             failed        +1.20% ± 0.10%, limit +0.50%
cumulative drift  inconclusive  not enough tokens
size              passed        as it was
speed             skipped       another cpu

differs       baseline  now
option level  all       absent
file a,       absent    ffffffffffff

window  token  loss was     is  text
     2      7     0.500  4.250  once␤[␤upon|]

perplexity  40.4800, was 40.0000 (186 tokens, paired)
bits        all logits equal at 25.000% of tokens, first other at window 0, token 4
text        some-text (sha256 cccccccccccc), 6 of 50 windows of 32 tokens
baseline    model.afqb
bundle      run"""

ANNOTATIONS = """\
::error title=afq-export check%3A drift failed::+1.20%25 ± 0.10%25, limit +0.50%25
::error title=afq-export check%3A cumulative drift inconclusive::not enough tokens
::notice title=afq-export check%3A speed skipped::another cpu
::warning title=afq-export check%3A not as in the baseline::option level: all -> absent; file a,: absent -> ffffffffffff
::notice title=afq-export check::FAIL  demo  w8a8-dynamic  linux-x64-ort  (drift, cumulative drift)"""

JUNIT = """\
<testsuites tests="4" failures="2" errors="0" skipped="1">
  <testsuite name="afq-export check" tests="4" failures="2" errors="0" skipped="1">
    <properties>
      <property name="verdict" value="fail" />
      <property name="baseline" value="model.afqb" />
      <property name="bundle" value="run" />
      <property name="artifact sha256" value="bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb" />
      <property name="perplexity" value="40.48" />
      <property name="baseline perplexity" value="40" />
      <property name="drift" value="0.012" />
      <property name="drift stderr" value="0.001" />
      <property name="cumulative drift" value="0.012" />
      <property name="top1" value="0.97" />
      <property name="kl" value="0.002" />
      <property name="identical" value="0.25" />
    </properties>
    <testcase classname="afq-export check: demo linux-x64-ort" name="drift">
      <failure message="+1.20% ± 0.10%, limit +0.50%" type="failed">+1.20% ± 0.10%, limit +0.50%
not as in the baseline: option level: all -&gt; absent; file a,: absent -&gt; ffffffffffff</failure>
    </testcase>
    <testcase classname="afq-export check: demo linux-x64-ort" name="cumulative drift">
      <failure message="not enough tokens" type="inconclusive">not enough tokens
not as in the baseline: option level: all -&gt; absent; file a,: absent -&gt; ffffffffffff</failure>
    </testcase>
    <testcase classname="afq-export check: demo linux-x64-ort" name="size">
      <system-out>as it was</system-out>
    </testcase>
    <testcase classname="afq-export check: demo linux-x64-ort" name="speed">
      <skipped message="another cpu" />
    </testcase>
  </testsuite>
</testsuites>
"""


def test_terminal() -> None:
    assert text(report()) == TEXT


def test_what_passed_is_short() -> None:
    shown = text(report(verdict="pass", gates=(Gate("drift", "passed", ""),), differences=()))
    assert shown.startswith("PASS  demo  w8a8-dynamic  linux-x64-ort\n") and "loss was" not in shown


def test_annotations() -> None:
    assert github.workflow_commands(report()) == ANNOTATIONS


def test_annotations_hold_no_command_of_their_own() -> None:
    """A line break in a message would start a line that the runner obeys."""
    gate = Gate("drift", "failed", "a\n::set-env name=X::b\r100%")
    first, *rest = github.workflow_commands(report(gates=(gate,), differences=())).splitlines()
    assert first == "::error title=afq-export check%3A drift failed::a%0A::set-env name=X::b%0D100%25"
    assert len(rest) == 1


def test_junit_golden_and_parsed() -> None:
    assert junit(report()) == JUNIT
    suite = Xml.fromstring(junit(report()))[0]
    assert [case.get("name") for case in suite.iter("testcase")] == ["drift", "cumulative drift", "size", "speed"]


def test_junit_of_letters_that_xml_has_not() -> None:
    gate = Gate("drift", "failed", '\x00\x0b\ud800\uffff<&"\U0001f600')
    found = Xml.fromstring(junit(report(gates=(gate,), differences=())).encode())
    assert found[0].find("testcase/failure").text == '????<&"\U0001f600'  # type: ignore[union-attr]


def test_junit_of_a_refusal() -> None:
    suite = Xml.fromstring(junit_error(InputError("cannot be compared", why="window was 64, is 32")))[0]
    (case,) = suite.iter("testcase")
    assert suite.get("errors") == "1" and suite.get("failures") == "0"
    assert case[0].get("type") == "InputError" and case[0].text == "cannot be compared: window was 64, is 32"


def test_summary_page(tmp_path: Path) -> None:
    page = markdown(report())
    assert page.startswith("## FAIL  demo") and "| drift | failed | +1.20% ± 0.10%, limit +0.50% |" in page
    assert "| 2 | 7 | 0.500 | 4.250 | once␤[␤upon\\|] |" in page
    summary = tmp_path / "summary.md"
    summary.write_text("earlier\n")
    assert github.append_summary(page, {github.SUMMARY: str(summary)}) == ""
    assert summary.read_text() == f"earlier\n{page}\n"
    assert github.append_summary(page, {}) == ""


@pytest.mark.parametrize(("before", "added", "fits"), [(0, 0, True), (0, 1, False), (1, 0, False), (1, -1, True)])
def test_a_summary_beyond_what_github_shows_is_said(tmp_path: Path, before: int, added: int, fits: bool) -> None:
    """All that the step wrote counts, to the byte."""
    summary = tmp_path / "summary.md"
    summary.write_text("e" * before)
    said = github.append_summary("x" * (github.MAX_SUMMARY - 1 + added), {github.SUMMARY: str(summary)})
    assert (said == "") is fits and (len(summary.read_text()) > before) is fits
    whole = github.MAX_SUMMARY + before + added
    warning = "::warning title=afq-export check%3A no step summary::"
    assert fits or said == f"{warning}it would have {whole} bytes, GitHub shows at most {github.MAX_SUMMARY}"


def test_a_summary_that_cannot_be_written_changes_no_verdict(tmp_path: Path) -> None:
    path = tmp_path / "no" / "summary.md"
    said = github.append_summary("page", {github.SUMMARY: str(path)})
    assert said.endswith(f"::cannot write {path}: No such file or directory")


def test_only_in_a_workflow() -> None:
    assert github.wanted({"GITHUB_ACTIONS": "true"}) and not github.wanted({}) and not github.wanted({"CI": "true"})


def test_a_baseline_for_a_reader() -> None:
    shown = baseline_text(baseline())
    for part in ("demo  w8a8-dynamic  linux-x64-ort", "40.0000 ± 1.5000", "onnxruntime 1.31.1", "2026-01-02", "none"):
        assert part in shown
