"""Recipes, targets and corpora: names, files, changes, and refusals that name file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from afq_export.errors import InputError
from afq_export.spec.catalog import CORPORA, METHODS, SCHEMES, TARGETS, entries, load_recipe, load_target

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.mark.parametrize("scheme", [e.name for e in entries(SCHEMES)])
@pytest.mark.parametrize("method", [e.name for e in entries(METHODS)])
def test_every_scheme_takes_every_method(scheme: str, method: str) -> None:
    recipe = load_recipe(f"{scheme}+{method}")
    assert recipe.name == f"{scheme}+{method}"
    assert (recipe.learning.epochs > 0) == (method in ("affinequant", "omniquant"))


def test_a_scheme_alone_means_its_default_method() -> None:
    assert load_recipe("w4a8-g32").transforms == load_recipe("w4a8-g32+affinequant").transforms


def test_every_shipped_file_describes_itself() -> None:
    for folder in (SCHEMES, METHODS, TARGETS, CORPORA):
        assert entries(folder)
        assert all(entry.description for entry in entries(folder))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_can_be_read(path: Path) -> None:
    assert load_recipe(str(path)).description


def test_changes_are_toml_or_words() -> None:
    recipe = load_recipe("w4a8", ("learning.epochs=3", "learning.schedule=constant", "samples.length = 64"))
    assert (recipe.learning.epochs, recipe.learning.schedule, recipe.samples.length) == (3, "constant", 64)


def test_a_file_may_start_from_shipped_ones(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('scheme = "w4a8"\nmethod = "omniquant"\n[learning]\nepochs = 2\n')
    recipe = load_recipe(str(path))
    assert recipe.name == "mine" and recipe.weights.bits == 4
    assert (recipe.learning.epochs, recipe.learning.stability_factor) == (2, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('scheme = "w4a8"\ncolour = 1\n', "colour"),
        ('scheme = "w4a8"\n[learning]\nepoch = 1\n', r"epoch.*\$\.learning"),
        ('scheme = "w4a8"\n[weights]\nbits = 9\n', r"\$\.weights\.bits"),
        ('scheme = "w9"\n', "no such recipe"),
        ("scheme = 9\n", r"mine\.toml\]: scheme = 9 is not a name"),
        ('scheme = "w4a8"\nmethod = ["awq"]\n', r"method = \['awq'\] is not a name"),
        ("weights = \n", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_file_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(str(path))


@pytest.mark.parametrize("change", ["learning.epochs", "=3", "learning.epochs=3=4=\n"])
def test_a_change_that_cannot_be_read(change: str) -> None:
    with pytest.raises(InputError):
        load_recipe("w4a8", (change,))


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(InputError, match=r"did you mean android-xnnpack\?"):
        load_target("android-xnpack")
    with pytest.raises(InputError, match=r"no such method.*omniquant"):
        load_recipe("w4a8+omni")


def test_a_huge_toml_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "bomb.toml"
    path.write_text("a = 1\n" * 300_000)
    with pytest.raises(InputError, match="too large"):
        load_recipe(str(path))
