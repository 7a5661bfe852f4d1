"""ExecuTorch's packages warn while they are imported, and here warnings are errors: import them first, in quiet."""

from __future__ import annotations

from afq_export.runtime.library import load_runtime

load_runtime()
