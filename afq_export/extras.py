"""Packages that single targets need: which extra brings them, and whose terms hold for the binaries in them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from afq_export.spec.strict import Data
from afq_export.spec.target import Sdk, TargetProfile


class Part(Data):
    """A Python module of a target's `tools`: the package that has it, the extra that installs that, its licence."""

    module: str
    package: str
    extra: str
    licence: str
    install: str = ""
    """The command that brings it, where an extra cannot."""

    @property
    def found(self) -> str:
        """The installed version, empty when there is none."""
        try:
            return version(self.package) if importlib.util.find_spec(self.module) else ""
        except PackageNotFoundError:
            return "unknown"


ETHOS_U = 'pip install "afq-export[ethos-u]" && pip install --no-deps "tosa-tools==2026.5.0"'
"""tosa-tools pins an ml_dtypes (0.5.1) that onnx does not take, so no extra can name it; it runs with newer ones."""
PARTS = (
    Part(
        module="onnxruntime_qnn",
        package="onnxruntime-qnn",
        extra="qnn",
        licence="MIT; Qualcomm's libraries in it under the wheel's Qualcomm_LICENSE.pdf",
    ),
    Part(module="coremltools", package="coremltools", extra="coreml", licence="BSD-3-Clause (Apple)"),
    Part(module="tosa_serializer", package="tosa-tools", extra="ethos-u", licence="Apache-2.0 (Arm)", install=ETHOS_U),
    Part(
        module="tosa_reference_model",
        package="tosa-tools",
        extra="ethos-u",
        licence="Apache-2.0 (Arm)",
        install=ETHOS_U,
    ),
    Part(module="ethosu", package="ethos-u-vela", extra="ethos-u", licence="Apache-2.0 (Arm)", install=ETHOS_U),
    Part(module="openvino", package="openvino", extra="openvino", licence="Apache-2.0 (Intel)"),
)
"""What the extras of pyproject.toml bring. Everything else that targets name is installed with afq-export."""


def part(module: str) -> Part | None:
    """The part called `module`; None for what afq-export itself depends on."""
    return next((part for part in PARTS if part.module == module), None)


def packages(tools: Collection[str]) -> tuple[str, ...]:
    """The packages of PARTS that have one of the modules `tools`, each once."""
    return tuple(dict.fromkeys(known.package for known in PARTS if known.module in tools))


def install_line(module: str) -> str:
    """The command that brings `module`."""
    known = part(module)
    if known is None:
        return f"pip install {module}"
    return known.install or f'pip install "afq-export[{known.extra}]"'


def kit_present(kit: Sdk) -> bool:
    """Whether a vendor's kit is there: its module, or the folder that its variable names."""
    folder = os.environ.get(kit.variable, "") if kit.variable else ""
    module = bool(kit.module) and importlib.util.find_spec(kit.module) is not None
    return module or bool(folder and Path(folder).is_dir())


def missing_here(target: TargetProfile) -> dict[str, str]:
    """What the target needs and this machine lacks: name -> how to get it."""
    lacks = {tool: install_line(tool) for tool in target.tools if importlib.util.find_spec(tool) is None}
    if target.sdk is not None and not kit_present(target.sdk):
        lacks[target.sdk.name] = f"from {target.sdk.get}"
    return lacks
