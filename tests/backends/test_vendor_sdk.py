"""Targets whose vendor hands out its compiler by itself: refused at once where it is needed, usable up to there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from afq_export.backends import vendor_sdk
from afq_export.errors import InputError, MissingToolError
from afq_export.extras import kit_present, missing_here
from afq_export.job import resolve
from afq_export.pipeline import open_folder, run_calibrate, run_quantize
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import TARGETS, entries, load_recipe, load_target
from afq_export.spec.quant import Granularity
from afq_export.spec.request import Request
from afq_export.spec.target import Sdk, TargetProfile
from tests.checkpoints import small_config

VENDORS = [p for p in (load_target(entry.name) for entry in entries(TARGETS)) if p.backend == "vendor-sdk"]
NAMES = [target.name for target in VENDORS]


def test_the_four_are_there() -> None:
    assert set(NAMES) == {"android-qnn-executorch", "mediatek-neuropilot", "samsung-enn", "nxp-neutron"}
    assert {target.status for target in VENDORS} == {"untested"}


@pytest.mark.parametrize("target", VENDORS, ids=NAMES)
def test_run_is_refused_before_any_work(target: TargetProfile) -> None:
    """With the kit's name, version and where it is to be had, and exit code 3."""
    with pytest.raises(MissingToolError) as caught:
        resolve(Request(target=target.name, tiny=True))
    said = str(caught.value)
    assert target.sdk.name in said and target.sdk.version in said and target.sdk.get in said
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("target", VENDORS, ids=NAMES)
def test_the_stages_before_it_work(target: TargetProfile, tmp_path: Path) -> None:
    """Calibrated and quantized: integers on the grids that the vendor states, with ranges for every input."""
    recipe = f"{target.default_recipe}+rtn"
    request = Request(target=target.name, tiny=True, recipe=recipe, out=str(tmp_path / "run"), threads=1)
    job = resolve(request, lowers=False)
    assert target.sdk.name in job.missing
    with open_folder(job) as folder:
        checkpoint = run_quantize(job, folder, run_calibrate(job, folder, silent), silent)
    for record in checkpoint.records.values():
        assert record.kernel in {kernel.name for kernel in target.kernels}
        assert record.input is not None
    with pytest.raises(MissingToolError):
        vendor_sdk.write(checkpoint, target, tmp_path, job.calibration.ids_NT[0], {}, silent)


def test_a_tensor_has_one_scale_where_the_vendor_has_no_other(tmp_path: Path) -> None:
    records = assign(small_config(), load_recipe("w8a8-static"), load_target("nxp-neutron"))
    assert {record.spec.weight.granularity for record in records.values()} == {Granularity.PER_TENSOR}
    assert all("instead of int8 per_channel" in record.note for record in records.values())
    with pytest.raises(InputError, match="takes per_tensor weights, not per_channel"):
        strict = msgspec.structs.replace(load_recipe("w8a8-static"), fallback="refuse")
        assign(small_config(), strict, load_target("nxp-neutron"))


def test_four_bits_are_refused_where_none_are_stated() -> None:
    with pytest.raises(InputError, match="5/6/7/8-bit weights, not 4"):
        assign(small_config(), load_recipe("w4a8-static"), load_target("samsung-enn"))


def test_a_kit_that_is_there_is_not_taken_for_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target("android-qnn-executorch")
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    assert kit_present(target.sdk) and target.sdk.name not in missing_here(target)
    with pytest.raises(MissingToolError, match="no lowering to Qualcomm AI Runtime"):
        vendor_sdk.refuse(target, {})


def test_what_marks_a_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_KIT", raising=False)
    assert not kit_present(Sdk(name="k", version="1", get="there", module="no_such_module", variable="A_KIT"))
    assert kit_present(Sdk(name="k", version="1", get="there", module="json"))
    monkeypatch.setenv("A_KIT", str(tmp_path / "gone"))
    assert not kit_present(Sdk(name="k", version="1", get="there", variable="A_KIT"))


def test_a_target_that_names_no_kit_is_refused() -> None:
    with pytest.raises(InputError, match=r"\[sdk\]"):
        vendor_sdk.refuse(msgspec.structs.replace(VENDORS[0], sdk=None), {})


@pytest.mark.parametrize("call", ["open_session", "runtime", "coverage", "describe"])
def test_there_is_no_program(call: str, tmp_path: Path) -> None:
    bundle = dataclasses.make_dataclass("Bundle", ["folder"])(tmp_path)
    arguments = {"open_session": [bundle], "describe": [tmp_path]}.get(call, [bundle, VENDORS[0], None])
    with pytest.raises(MissingToolError, match="no program was made"):
        getattr(vendor_sdk, call)(*arguments)
