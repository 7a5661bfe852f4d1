"""`report` writes a page and its Markdown beside the bundle, compares two, and refuses in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

from afq_export.cli import call


def test_the_report_of_a_run(finished: Path, tmp_path: Path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = sorted(path.name for path in (run / "bundle").iterdir())
    assert call(["report", str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(run / "report.md")]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'class="verdict pass"' in page and page.count("<svg") >= 3 and "Folds" in page and "Size" in page
    assert (run / "report.md").read_text(encoding="utf-8").count("\n## ") >= 7
    assert sorted(path.name for path in (run / "bundle").iterdir()) == before  # the bundle is sealed
    assert call(["report", str(run), str(run / "bundle"), "--out", str(tmp_path / "two.html")]) == 0
    assert "Side by side" in (tmp_path / "two.html").read_text(encoding="utf-8")


def test_refusals(finished: Path, tmp_path: Path, refused):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert refused("report", str(run), "--out", str(tmp_path / "page.pdf")).startswith("not a name for a page")
    inside = str(run / "bundle" / "page.html")
    assert refused("report", str(run), "--out", inside).startswith("the page would lie in the bundle")
    (run / "bundle" / "report.json").unlink()
    assert "report.json" in refused("report", str(run))
    assert refused("report", str(tmp_path)).startswith("unknown kind of folder")
