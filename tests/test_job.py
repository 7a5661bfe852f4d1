"""What a job depends on, and what it waits for."""

from __future__ import annotations

import dataclasses

import pytest

from afq_export import extras
from afq_export.calibrate.shards import Shards
from afq_export.errors import InputError, MissingToolError
from afq_export.job import VERSIONED, check_tools, missing_tool, resolve, versions
from afq_export.lower.lower import command_line
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import TARGETS, entries, load_recipe, load_target
from afq_export.spec.request import Request
from tests.checkpoints import small_config
from tests.models import opt_config


@pytest.mark.parametrize("name", [entry.name for entry in entries(TARGETS)])
def test_versions_are_those_of_the_targets_own_tools(name: str) -> None:
    """Another target's compiler is no part of a run: installing it may not make the run another one."""
    target = load_target(name)
    own = {part.package for part in extras.PARTS if part.module in target.tools}
    assert versions(target.tools).keys() == {"afq-export", *VERSIONED} | own
    assert extras.packages(target.tools) == tuple(dict.fromkeys(extras.packages(target.tools)))


def test_every_tool_has_a_version() -> None:
    tools = {tool for entry in entries(TARGETS) for tool in load_target(entry.name).tools}
    assert tools <= set(VERSIONED) | {part.module for part in extras.PARTS}


def test_what_no_tool_helps_with_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the target cannot run, before the tools that are missing."""
    monkeypatch.setattr("afq_export.job.importlib.util.find_spec", lambda name: None)
    target = load_target("ethos-u85")
    with pytest.raises(MissingToolError):
        check_tools(target)
    recipe = load_recipe("w8a8-static")
    with pytest.raises(InputError, match="no integer LayerNorm"):
        missing_tool(target, assign(opt_config(), recipe, target))
    large = small_config(hidden=4096, head_dim=1024, intermediate=8192)
    with pytest.raises(InputError, match="does not fit into the target's"):
        missing_tool(target, assign(large, recipe, target))
    found = missing_tool(target, assign(small_config(), recipe, target))
    assert found is not None and "no Python module executorch" in str(found)


def test_the_command_in_the_manifest_has_all_that_decides_bytes() -> None:
    job = resolve(Request(tiny=True, threads=1, seed=3, changes=("learning.batch=4",)), lowers=False)
    plain = "afq-export run --target android-xnnpack --recipe w4a8-g32 --seed 3 --threads 1"
    assert " ".join(command_line(job)) == f"{plain} --set learning.batch=4 --tiny"
    elsewhere = dataclasses.replace(job, shards=Shards(2), device="cuda")
    assert " ".join(command_line(elsewhere)) == f"{plain} --shards 2 --device cuda --set learning.batch=4 --tiny"


def test_a_bias_that_no_kernel_takes() -> None:
    with pytest.raises(InputError, match="take a model whose linears have no bias, or another target"):
        assign(opt_config(), load_recipe("w8a16-static"), load_target("android-qnn-htp"))
