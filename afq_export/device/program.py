"""The exported file of a bundle as a device runs it: what is copied there, and the options of its session."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from afq_export.backends.onnxruntime import SESSION_FILE
from afq_export.device.kit import RUNNERS
from afq_export.errors import InputError
from afq_export.lower.bundle import Bundle
from afq_export.runtime.onnxruntime import LEVEL, RunOptions, read_options

BACKENDS = ("xnnpack", "onnxruntime")
"""Those whose programs our own runners have the kernels of."""


@dataclasses.dataclass(frozen=True)
class Program:
    """An exported file and the tensors beside it; `options` of ONNX Runtime, None for others."""

    runtime: str
    files: tuple[Path, ...]
    options: RunOptions | None = None

    @property
    def model(self) -> str:
        """The file's name."""
        return self.files[0].name

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def lines(self) -> list[str]:
        """The options as lines of a job."""
        if self.options is None:
            return []
        entries = [f"entry {key} {value}" for key, value in self.options.session.items() if key != LEVEL]
        providers = [f"provider {name}" for name in self.options.providers]
        return [f"level {self.options.session.get(LEVEL, 'all')}", *entries, *providers]


def program_of(bundle: Bundle, *, own_runner: bool = False) -> Program:
    """The program of a bundle. Raises InputError where no runner has its kernels, unless the user brings one."""
    if bundle.runtime not in RUNNERS or (bundle.backend not in BACKENDS and not own_runner):
        raise InputError(
            "no runner for this bundle on a device",
            where=str(bundle.folder),
            why=f"it is for {bundle.backend}, runners are for {', '.join(BACKENDS)}",
        )
    beside = bundle.model.with_name(f"{bundle.model.name}.data")
    files = (bundle.model, *((beside,) if beside.name in bundle.manifest.files else ()))
    options = bundle.model.with_name(SESSION_FILE)
    return Program(bundle.runtime, files, read_options(options) if bundle.runtime == "onnxruntime" else None)
