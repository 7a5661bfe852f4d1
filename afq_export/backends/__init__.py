"""The backends that a target can name: one module each, the same names in each (see `Backend`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.lower.bundle import Bundle
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint
from afq_export.spec.recipe import Embedding
from afq_export.spec.report import Coverage
from afq_export.spec.target import BackendName, TargetProfile

if TYPE_CHECKING:
    from afq_export.runtime.session import Session
    from afq_export.validate.ladder import Runtime


class Backend(Protocol):
    """What a module of this folder has. Nothing heavy is imported before a function is called."""

    PROGRAM: str
    """The file of a bundle that is the program."""

    def refuse(self, target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
        """Raises InputError or MissingToolError for what lowering or running would fail on, before any work."""

    def overhead(self, config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
        """Bytes of a program besides its parameters: graph, names, position tables, zero points."""

    def shares_rows(self, head: LinearRecord, embedding: Embedding, target: TargetProfile) -> bool:
        """Whether token rows and a head that is tied to them are one tensor of the file."""

    def write(
        self,
        checkpoint: QuantizedCheckpoint,
        target: TargetProfile,
        folder: Path,
        vector: Tensor,
        provenance: dict[str, str],
        progress: Progress,
    ) -> None:
        """Writes the program and what belongs to it. `vector` int64 [T] are the tokens of the test vectors.

        Raises InputError when the target has no such program, VerdictError when the file is not the checkpoint's.
        """

    def open_session(self, bundle: Bundle) -> Session:
        """The bundle's program in its runtime. Raises MissingToolError where nothing here runs it."""

    def runtime(self, bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Runtime:
        """What validation needs of the runtime; loaded when it is first asked for."""

    def coverage(self, bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Coverage:
        """What the file holds, read back from it. Raises VerdictError when it is not the checkpoint's program."""

    def describe(self, path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
        """Facts of a program file, and each of its linears as (kernel, O, I, weight grid, activation grid)."""


def backend(name: BackendName) -> Backend:
    """The module of a backend, as targets name it; only that one is loaded."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
