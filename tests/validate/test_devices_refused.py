"""A bundle that no device here runs is refused before anything is measured, with its reports as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from afq_export.device.names import DeviceRequest, parse_device
from afq_export.errors import InputError
from afq_export.lower.bundle import seal
from afq_export.progress import silent
from afq_export.revalidate import revalidate
from afq_export.runfolder import RunFolder
from afq_export.spec.report import Manifest, ManifestModel


@pytest.mark.parametrize("backend", ["vulkan", "coreml", "cortex-m", "ethos-u"])
def test_no_runner_for_it(backend: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (tmp_path / "run.json").write_text('{"fingerprint": {}, "request": {}, "cost": {}}')
    for name in ("model.pte", "report.json"):
        (bundle / name).write_text("{}")
    manifest = Manifest(
        files={}, model=ManifestModel("m", "a" * 64), recipe="r", target="t", runtime="executorch", backend=backend,
        program="model.pte", versions={}, seed=0, command=(),
    )  # fmt: skip
    seal(bundle, manifest)
    with pytest.raises(InputError, match=f"it is for {backend}, runners are for"):
        revalidate(RunFolder(tmp_path), silent, DeviceRequest((parse_device("host"),)))
    assert (bundle / "report.json").read_text() == "{}"
