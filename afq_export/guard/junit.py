"""The report as JUnit XML, the form that CI servers read: one test case per gate.

GitLab shows `classname` as the suite and only the text of a failure, Jenkins the message: both are given. A gate that
could not decide is a failure of its own type. A comparison that was refused is a suite with one error.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as Xml

from afq_export.errors import AfqError
from afq_export.guard.text import differences_line
from afq_export.spec.guard import CheckReport, Gate

SUITE = "afq-export check"
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: CheckReport) -> str:
    """The document of a finished check."""
    facts = report.facts
    cases = [_case(gate, report) for gate in report.gates]
    properties = {
        "verdict": report.verdict,
        "baseline": report.baseline,
        "bundle": report.bundle,
        "artifact sha256": facts.artifact.sha256,
        "perplexity": f"{report.perplexity.value:.6g}",
        "baseline perplexity": f"{report.baseline_perplexity.value:.6g}",
        "drift": f"{report.drift.value:.6g}",
        "drift stderr": f"{report.drift.stderr:.6g}",
        "cumulative drift": f"{report.cumulative.value:.6g}",
        "top1": f"{report.top1:.6g}",
        "kl": f"{report.kl:.6g}",
        "identical": f"{report.identical:.6g}",
    }
    return _document(cases, properties)


def junit_error(error: AfqError) -> str:
    """The document of a check that could not be made."""
    case = Xml.Element("testcase", classname=SUITE, name="comparison")
    element = Xml.SubElement(case, "error", message=_clean(str(error)), type=type(error).__name__)
    element.text = _clean(str(error))
    return _document([case], {})


def _case(gate: Gate, report: CheckReport) -> Xml.Element:
    facts = report.facts
    case = Xml.Element("testcase", classname=_clean(f"{SUITE}: {facts.model.name} {facts.target}"), name=gate.name)
    detail = _clean(gate.detail)
    if gate.status == "skipped":
        Xml.SubElement(case, "skipped", message=detail)
    elif gate.status == "passed":
        Xml.SubElement(case, "system-out").text = detail
    else:
        failure = Xml.SubElement(case, "failure", message=detail, type=gate.status)
        changed = differences_line(report.differences)
        failure.text = detail + (f"\nnot as in the baseline: {_clean(changed)}" if changed else "")
    return case


def _document(cases: list[Xml.Element], properties: dict[str, str]) -> str:
    found = [child.tag for case in cases for child in case]
    counts = {
        "tests": str(len(cases)),
        "failures": str(found.count("failure")),
        "errors": str(found.count("error")),
        "skipped": str(found.count("skipped")),
    }
    root = Xml.Element("testsuites", counts)
    suite = Xml.SubElement(root, "testsuite", {"name": SUITE, **counts})
    if properties:
        listed = Xml.SubElement(suite, "properties")
        for name, value in properties.items():
            Xml.SubElement(listed, "property", name=name, value=_clean(value))
    suite.extend(cases)
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _clean(text: str) -> str:
    """`text` with a question mark for what XML 1.0 has no way to write."""
    return NO_XML.sub("?", text)
