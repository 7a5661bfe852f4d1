"""The pages say what the report says, stay well-formed, and share their tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.report.card import model_card
from afq_export.report.markdown import report_markdown
from afq_export.report.sections import MAX_DISAGREEMENTS
from afq_export.report.summary import summary
from afq_export.report.tables import Table, perplexity_table
from afq_export.spec import report as spec
from tests.report.sample import sample


def markdown_tables(page: str) -> list[list[str]]:
    """The lines of every table of a page."""
    tables, inside = [], False
    for line in page.splitlines():
        if line.startswith("|"):
            if not inside:
                tables.append([])
            tables[-1].append(line)
        inside = line.startswith("|")
    return tables


def columns(line: str) -> int:
    return line.replace("\\|", "").count("|") - 1


def test_the_report_page_has_every_figure():
    page = report_markdown(sample())
    for text in (
        "Verdict: **pass**",
        "3.800",
        "+2.70%",
        "98.50%",
        "a" * 64,
        "0.58 MB",
        "16 of 700 windows of 256 tokens",
        "no BOS",
        "flipped step at blocks.0.down\\_proj".replace("\\_", "_"),
        "near tie",
        "executorch's own, run alone; logits equal bit for bit at 75.000%",
        "attention over the cache",
        "bit for bit",
        "within 1e-07",
        "31.2",
        "calibration, s: 42",
        "the source model was not given",
    ):
        assert text in page, text
    assert "export, s" not in page
    assert page.endswith("\n")


@pytest.mark.parametrize("page", [report_markdown, model_card])
def test_tables_are_rectangular(page):
    tables = markdown_tables(page(sample()))
    assert len(tables) >= 3
    for lines in tables:
        assert len({columns(line) for line in lines}) == 1, lines


def test_a_departure_is_on_top():
    layer = spec.LayerReport("blocks.0.q_proj", "qd8-f32-qc8w", False, False, 3.0, 0.1, 8.0)
    report = sample(verdict="fail", first_departure="blocks.0.q_proj", layers=(layer,))
    page = report_markdown(report)
    assert page.splitlines()[2] == "Verdict: **fail**, first departure: `blocks.0.q_proj`"
    assert "DEPARTS" in page
    assert "first departure" in summary(report)


def test_a_skipped_rung_is_never_a_number():
    report = sample(perplexity=spec.Perplexities(integer=spec.Perplexity(3.7, 0.05, 10)))
    table = perplexity_table(report)
    assert [row[1] for row in table.rows] == ["skipped", "skipped", "skipped", "3.700", "skipped"]
    assert all(row[3] == "-" for row in table.rows)


def test_many_disagreements_are_cut():
    one = spec.Disagreement(0, 17, 5, 9, 3e-2, "unexplained")
    agreement = msgspec.structs.replace(sample().agreement, disagreements=(one,) * (MAX_DISAGREEMENTS + 3))
    page = report_markdown(sample(agreement=agreement))
    assert page.count("| unexplained |") == MAX_DISAGREEMENTS
    assert "3 more in report.json" in page


def test_the_summary_is_aligned():
    lines = summary(sample(), Path("out/bundle")).splitlines()
    assert lines[0] == "PASS  stories260K  w4a8-g32  android-xnnpack"
    start = lines.index(next(line for line in lines if line.startswith("rung ")))
    table = lines[start : start + 6]
    assert len({line.index(cell) for line, cell in zip(table[1:], ["3.700"] * 4 + ["3.800"], strict=True)}) == 1
    assert any(line.split() == ["bundle", "out/bundle"] for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_the_card_is_one_that_hugging_face_reads():
    hub = pytest.importorskip("huggingface_hub")
    page = model_card(sample(), spec.Origin("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"))
    data = hub.ModelCard(page).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.license == "apache-2.0"
    assert data.library_name == "executorch"
    assert data.pipeline_tag == "text-generation"
    assert {"android-xnnpack", "w4a8-g32", "quantized"} <= set(data.tags)
    assert data.base_model_relation == "quantized"


def test_the_card_without_a_hub_model_names_none():
    page = model_card(sample())
    assert "base_model" not in page
    assert "license" not in page


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=30), min_size=2, max_size=2), st.booleans())
def test_no_cell_breaks_a_table(cells, right):
    table = Table(("a", "b"), (tuple(cells),), frozenset({1} if right else ()))
    lines = table.markdown().split("\n")
    assert len(lines) == 3
    assert all(columns(line) == 2 for line in lines)


def test_reports_are_immutable_and_closed():
    with pytest.raises(AttributeError):
        sample().verdict = "fail"
    plain = msgspec.json.decode(spec.to_json(sample()))
    with pytest.raises(msgspec.ValidationError):
        spec.read_report(msgspec.json.encode(plain | {"extra": 1}))
    assert spec.read_report(spec.to_json(sample()).encode()) == sample()
    assert not dataclasses.is_dataclass(sample())
