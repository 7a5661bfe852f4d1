"""Lowering to Core ML: one program in Apple's Model Intermediate Language, as an .mlpackage and inside a .pte.

    operand + decoder    the families' functions write the program; KV caches are states of it
    package              the .mlpackage on disk, and the same package as the delegate of an ExecuTorch program
    readback             operations and constants of a package, decoded from its own bytes
    evaluate             what those operations mean, in torch: nothing here runs Core ML
    program              all of it, verified

The program is built and not traced: coremltools' converter for exported torch programs takes the update of a cache at a
dynamic position for another shape than it has, and every rewrite of it would be one more thing to prove.
"""

from __future__ import annotations

from afq_export.runtime.library import load_coremltools

load_coremltools()
