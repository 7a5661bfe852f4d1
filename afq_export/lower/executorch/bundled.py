"""A program together with inputs and the outputs it must give, as ExecuTorch's own BundledProgram."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from afq_export.runtime.library import quiet

with quiet():
    from executorch.devtools import BundledProgram
    from executorch.devtools.bundled_program.config import MethodTestCase, MethodTestSuite
    from executorch.devtools.bundled_program.serialize import serialize_from_bundled_program_to_flatbuffer


def bundled_program(pte: bytes, cases: Sequence[tuple[list[Tensor], list[Tensor]]]) -> bytes:
    """The .bpte of a finished program; each case is (inputs, expected outputs) of `forward`.

    Nothing is lowered again. `BundledModule.verify_result_with_bundled_expected_output` runs a case and compares.
    """
    suite = MethodTestSuite(
        "forward", [MethodTestCase(inputs=given, expected_outputs=expected) for given, expected in cases]
    )
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.pte"
        path.write_bytes(pte)
        bundle = BundledProgram(None, [suite], pte_file_path=str(path))
        return serialize_from_bundled_program_to_flatbuffer(bundle)
