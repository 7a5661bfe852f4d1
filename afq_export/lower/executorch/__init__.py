"""Lowering to ExecuTorch with the XNNPACK delegate.

    segments -> graph -> delegates        integers written into XNNPACK's own format, cut at attention
    decoder + compose -> program          embedding, KV cache and attention around them, exported by torch
    readback                              what is really in the file, compared with the checkpoint
    probe, bundled                        single linears in the runtime; test vectors

Importing any module of this folder raises MissingToolError without ExecuTorch.
"""

from __future__ import annotations

from afq_export.runtime.library import load_runtime

load_runtime()
