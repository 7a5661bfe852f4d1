"""Lowering to ExecuTorch with the Vulkan delegate, for GPUs.

    decoder     the families' functions as a torch module, our integers in its linears
    program     exported, partitioned by ExecuTorch, verified
    readback    the delegate's graph and constants, decoded from the file
    evaluate    what that graph means, in torch: nothing here runs Vulkan

ExecuTorch's Vulkan backend recognises a quantized linear by its pattern and packs its weight. What it does not
recognise it computes in float without a word, so every linear is looked up in the finished file.
"""

from __future__ import annotations

from afq_export.runtime.library import load_runtime

load_runtime()
