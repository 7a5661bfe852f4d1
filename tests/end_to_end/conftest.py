"""ExecuTorch's packages warn while they are imported, and here warnings are errors: import them first, in quiet."""

from __future__ import annotations

import pytest

from afq_export.runtime.library import load_runtime
from tests.end_to_end.runs import Runs

load_runtime()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs shared by all tests of this folder."""
    return Runs(tmp_path_factory.mktemp("runs"))
