"""Help is instant, complete, and up to date in the pages made from it."""

from __future__ import annotations

import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from afq_export.cli import call

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "executorch", "safetensors", "onnx", "gguf")

EVERY_HELP = f"""
import sys
import typer
from afq_export.cli import app, call

def helps(group, path):
    assert call([*path, "--help"]) == 0
    for name, command in getattr(group, "commands", {{}}).items():
        helps(command, [*path, name])

helps(typer.main.get_command(app), [])
for light in (["recipes", "list"], ["recipes", "show", "w4a8"], ["targets", "list"], ["doctor"]):
    assert call(light) in (0, 3)
print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""


def test_no_help_and_no_catalog_imports_anything_heavy():
    done = subprocess.run([sys.executable, "-c", EVERY_HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for name in ("run", "plan", "validate", "perplexity", "generate", "doctor"):
        assert f"afq-export {name}" in done.stdout


def test_help_takes_half_a_second_of_processor_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "afq_export", "--help"], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # half of it on an idle machine


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]):
    assert call([]) == 0
    assert "Usage: afq-export" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]):
    assert call(["--version"]) == 0
    assert capsys.readouterr().out.startswith("afq-export ")


def test_pages_made_from_the_program_are_up_to_date():
    made = runpy.run_path(str(ROOT / "examples" / "reference.py"))["pages"]()
    old = [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert not old, "run `python examples/reference.py`"
