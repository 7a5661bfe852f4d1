"""Every claim of a target file is exercised by a test or stated by the vendor; and a target is one file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from afq_export.backends import backend
from afq_export.errors import InputError
from afq_export.extras import PARTS, install_line, missing_here
from afq_export.quantize.assign import assign
from afq_export.report.targets import long, needs, short, target_line
from afq_export.spec.catalog import TARGETS, data_root, entries, load_recipe, load_target
from afq_export.spec.target import TargetProfile
from tests.checkpoints import small_config

ROOT = Path(__file__).parents[2]
PROFILES = [load_target(entry.name) for entry in entries(TARGETS)]
NAMES = [profile.name for profile in PROFILES]
PAGE = re.compile(r"https://[\w./-]+")


def modules() -> list[str]:
    """The text of every other test module."""
    paths = (path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__))
    return [path.read_text(encoding="utf-8") for path in paths]


def family_of(name: str) -> set[str]:
    """A target and those that it is based on: their kernels are the same."""
    data = tomllib.loads((data_root() / TARGETS / f"{name}.toml").read_text(encoding="utf-8"))
    return {name} | (family_of(data["base"]) if "base" in data else set())


@pytest.mark.parametrize("profile", PROFILES, ids=NAMES)
def test_every_kernel_is_exercised_or_stated(profile: TargetProfile) -> None:
    """By its name, or with all kernels of its target; `untested` targets name the vendor's page instead."""
    texts = modules()
    whole = any(name in text and "kernels" in text for text in texts for name in family_of(profile.name))
    for kernel in profile.kernels:
        if kernel.stated_by:
            assert PAGE.fullmatch(kernel.stated_by), kernel.name
            assert any(kernel.stated_by in source for source in profile.sources), kernel.name
        else:
            assert whole or any(kernel.name in text for text in texts), f"{profile.name}: no test has {kernel.name}"


@pytest.mark.parametrize("profile", PROFILES, ids=NAMES)
def test_the_status_fits_what_is_known(profile: TargetProfile) -> None:
    """`untested`: nothing but the vendor's word. The others: nothing on the vendor's word alone."""
    stated = [bool(kernel.stated_by) for kernel in profile.kernels]
    assert all(stated) if profile.status == "untested" else not any(stated)
    assert all(kernel.reason for kernel in profile.kernels if kernel.max_relative_error)
    for source in profile.sources:
        assert PAGE.search(source), source


@pytest.mark.parametrize("profile", PROFILES, ids=NAMES)
def test_the_default_recipe_fits(profile: TargetProfile) -> None:
    config = small_config(hidden=128, head_dim=32, intermediate=256)
    records = assign(config, load_recipe(profile.default_recipe), profile)
    assert {record.kernel for record in records.values()} <= {kernel.name for kernel in profile.kernels}


@pytest.mark.parametrize("profile", PROFILES, ids=NAMES)
def test_the_backend_is_there(profile: TargetProfile) -> None:
    assert backend(profile.backend).PROGRAM


@pytest.mark.parametrize("profile", PROFILES, ids=NAMES)
def test_the_list_says_it_all(profile: TargetProfile) -> None:
    line = target_line(profile)
    assert (line.status, line.runtime, line.backend) == (profile.status, profile.runtime, profile.backend)
    assert len(line.needs) == len(profile.tools) + (profile.sdk is not None)
    assert set(line.missing) == set(missing_here(profile))
    assert line.accepts and all(long(kernel).startswith(f"`{kernel.name}`") for kernel in profile.kernels)


def test_kernels_in_a_word() -> None:
    words = {kernel.name: short(kernel) for kernel in load_target("android-xnnpack").kernels}
    assert words["qd8-f32-qb4w"] == "w2-4 group a8 dynamic" and words["qs8-qc8w"] == "w2-8 row a8 static"
    assert short(load_target("ios-coreml").kernels[0]) == "w2-4 row float"
    assert short(load_target("nxp-neutron").kernels[0]) == "w5-8 tensor a8 static"
    assert needs(load_target("ios-coreml")) == ("executorch", "coremltools [coreml]")


def test_every_extra_is_in_the_project_file() -> None:
    extras = tomllib.loads((data_root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = {name: " ".join(packages) for name, packages in extras["optional-dependencies"].items()}
    for part in PARTS:
        assert part.licence and part.extra in lines
        assert part.install or part.package in lines[part.extra], part
        assert install_line(part.module) == (part.install or f'pip install "afq-export[{part.extra}]"')
    assert install_line("executorch") == "pip install executorch"


@pytest.mark.parametrize("base", ["android-xnnpack", "android-vulkan", "ios-coreml"])
def test_a_new_target_is_one_file(base: str, tmp_path: Path) -> None:
    """A device of a known backend: its own limits, and nothing written anywhere else."""
    path = tmp_path / "my-watch.toml"
    path.write_text(
        f'base = "{base}"\nname = "my-watch"\ndescription = "A watch"\nstatus = "untested"\n'
        "[shapes]\ncontext = 24\nprefill = 4\n"
    )
    profile = load_target(str(path))
    assert (profile.name, profile.shapes.context, profile.backend) == ("my-watch", 24, load_target(base).backend)
    records = assign(small_config(), load_recipe(profile.default_recipe), profile)
    backend(profile.backend).refuse(profile, records)
    assert target_line(profile).name == "my-watch"


def test_a_new_target_may_leave_kernels_out(tmp_path: Path) -> None:
    path = tmp_path / "my-watch.toml"
    text = (data_root() / TARGETS / "ios-coreml.toml").read_text(encoding="utf-8")
    head, *kernels = text.split("[[kernels]]")
    path.write_text("[[kernels]]".join([head.replace('"ios-coreml"', '"my-watch"'), kernels[0]]))
    with pytest.raises(InputError, match="int4-channel takes per_channel weights, not per_group"):
        assign(small_config(), load_recipe("w4a16-g32", ("fallback=refuse",)), load_target(str(path)))


def test_a_target_of_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "android-xnnpack"\nbackend = "abacus"\n')
    with pytest.raises(InputError, match="abacus"):
        load_target(str(path))
