"""The HTML page needs nothing else, is well-formed, says what the Markdown says; two bundles stand side by side."""

from __future__ import annotations

import html.parser
import re
import xml.etree.ElementTree as ET

import msgspec
import pytest

from afq_export.report import page, plots
from afq_export.report.compare import Subject, comparison
from afq_export.report.markdown import report_markdown
from afq_export.report.summary import summary
from afq_export.spec import report as spec
from afq_export.spec.cache import Cache
from afq_export.spec.history import EpochRecord, History, Tuning
from tests.report.sample import sample

MANIFEST = spec.Manifest(
    files={"model.pte": "d" * 64},
    model=spec.ManifestModel("stories260K", "a" * 64),
    recipe="w4a8-g32",
    target="android-xnnpack",
    versions={"torch": "2.13"},
    seed=0,
    command=("afq-export", "run"),
)
VOID = {"meta", "br"}
LOADS = ("src", "href", "xlink:href", "data", "action")


def history() -> tuple[History, ...]:
    epochs = tuple(EpochRecord(epoch, 0.5 - 0.1 * epoch, 0.8, 12.0 + epoch, 0.1) for epoch in range(3))
    return (History(0.9, 0.5, 0.3, epochs), History(0.8, 0.4, 0.4, (), ("nothing better was learned",)))


def layers(sqnr: float) -> tuple[spec.LayerReport, ...]:
    names = [f"blocks.{block}.{role}" for block in range(2) for role in ("q_proj", "down_proj")]
    return tuple(spec.LayerReport(name, "qd8", True, True, 0.0, 0.0, sqnr + index) for index, name in enumerate(names))


def full(**changes: object) -> spec.ValidationReport:
    site = spec.Site(
        "norm_to_qkv", "norm", ("attn_norm",), ("q_proj",), "affine", "diagonal", True, "", {"affine": "q<k"}
    )
    given = {"calibration": history(), "layers": layers(20.0), "size": spec.Size(100, 200, 300, 400), "sites": (site,)}
    return sample(**given | changes)


def subject(report: spec.ValidationReport, **made: str) -> Subject:
    return Subject("a <b>&", report, MANIFEST, {"recipe.name": "one", "seed": "0"} | made)


class Balanced(html.parser.HTMLParser):
    """Raises when a tag closes another than the one that is open; collects what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in VOID else [tag]
        self.loaded += [v for k, v in attrs if k in LOADS and v[0] != "#" and not v.startswith("data:")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag, tag


def parsed(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("two", [False, True])
def test_the_page_is_whole_and_alone(two):
    subjects = [subject(full())] + [subject(full(verdict="fail", layers=layers(30.0)))] * two
    text = page.html(subjects)
    found = parsed(text)
    assert found.loaded == [] and "<script" not in text and "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert text == page.html(subjects)  # the same bytes for the same figures
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "<b>&" not in text.replace("<b>&amp;", "")  # names are escaped
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_verdict_first_and_every_section():
    text = page.html([subject(full())])
    assert text.index('class="verdict pass"') < text.index("<section>")
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    expected = [
        "Perplexity",
        "Checks",
        "Where the exported file chooses another token",
        "Calibration",
        "Coverage",
        "Size",
    ]
    assert titles == [*expected, "Folds", "Layers", "Source and cost", "Provenance"]
    for word in ("3.800", "no affine at norm_to_qkv: q&lt;k", "attention over the cache", "afq-export run", "0.00 MB"):
        assert word in text, word
    words = page.markdown([subject(full())])
    assert [line[3:] for line in words.splitlines() if line.startswith("## ")] == [
        *expected,
        "Folds",
        "Layers",
        "Provenance",
    ]


def test_every_form_says_what_the_cache_holds() -> None:
    report = full(kv_cache=Cache(bits=8, group=32, token_bytes=6480, float_token_bytes=23040))
    line = "int8, a grid per token and head of 32 numbers: 6.48 MB per 1,000 tokens, 28.1% of float32's 23.04 MB"
    assert f"- KV cache: {line}" in report_markdown(report)
    assert line.split("float32")[0] in page.html([subject(report)])
    assert re.search(rf"^KV cache +{re.escape(line)}$", summary(report), re.MULTILINE)
    assert "KV cache" not in report_markdown(full())


def test_a_failure_is_on_top():
    report = full(verdict="fail", first_departure="lm_head", checks=(spec.Check("layers", "failed", "1 departs"),))
    top = page.html([subject(report)]).split("</header>")[0]
    assert 'class="verdict fail"' in top and "First departure: lm_head" in top and "layers: 1 departs" in top


def test_plots_are_drawings_of_all_figures():
    report = full()
    for drawing, texts in (
        (plots.rungs_plot({"A": report, "B": report}), ["exported file", "A", "B"]),
        (plots.losses_plot(report.calibration), ["rounded only", "kept"]),
        (plots.epochs_plot(report.calibration), ["block 0", "epoch"]),
        (plots.health_plot(report.calibration), ["dominance margin"]),
        (plots.layers_plot(report.layers, {x.name: x.sqnr_db for x in report.layers}, "SQNR, dB", ".0f"), list("0123")),
    ):
        root = ET.fromstring(drawing)
        shown = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
        assert all(any(text in (line or "") for line in shown) for text in texts), (texts, shown)
        assert "var(--line)" in drawing and "#010101" not in drawing and "width" not in root.attrib
    shown = plots.layers_plot(report.layers, {x.name: x.sqnr_db for x in report.layers}, "SQNR, dB", ".0f")
    assert [cell for cell in ("20", "21", "22", "23") if f">{cell}</text>" in shown] == ["20", "21", "22", "23"]
    assert plots.epochs_plot(()) == plots.health_plot(()) == ""
    assert plots.layers_plot(report.layers, {}, "x", "") == ""


def test_two_reports_side_by_side():
    other = full(
        layers=layers(30.0),
        perplexity=msgspec.structs.replace(full().perplexity, runtime=spec.Perplexity(4.18, 0.05, 4080)),
    )
    parts = {part.title: part for part in comparison(subject(full()), subject(other, seed="1", extra="new"))}
    rows = {row[0]: row[1:] for row in parts["Side by side"].table.rows}
    assert rows["perplexity of the file"] == ("3.800 ± 0.050", "4.180 ± 0.050", "+10.00%")
    assert rows["over float"][:2] == ("+2.70%", "+12.97%")
    assert parts["What differs"].table.rows == (("seed", "0", "1"), ("extra", "-", "new"))
    assert {row[-1] for row in parts["Layers"].table.rows} == {"+10.0"}
    assert comparison(subject(full()), subject(full()))[2].text.startswith("Nothing")


def test_other_protocols_are_not_compared():
    protocol = msgspec.structs.replace(sample().protocol, window=128)
    first, second, *_ = comparison(subject(full()), subject(full(protocol=protocol)))
    assert {row[0]: row[3] for row in first.table.rows}["perplexity of the file"] == "-"
    assert "not compared" in first.after and second.plots() == []
    assert {row[3] for row in second.table.rows} == {"-"}


@pytest.mark.parametrize(("kept", "end"), [(True, "1.100e-01 after"), (False, "left as it was")])
def test_what_came_after_the_blocks_is_said(kept: bool, end: str) -> None:
    tuned = full(tuning=Tuning(20, 96, 0.125, 0.11, kept))
    text = report_markdown(tuned)
    assert "end to end: 20 steps on 96 windows" in text and end in text
    assert "end to end" not in report_markdown(full())
