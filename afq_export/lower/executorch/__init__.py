"""Lowering to ExecuTorch with the XNNPACK delegate. Importing any module of this folder needs ExecuTorch."""

from __future__ import annotations

from afq_export.runtime.executorch import require_executorch

require_executorch()
