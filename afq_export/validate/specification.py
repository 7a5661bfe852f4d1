"""What an ONNX file means, apart from what a runtime makes of it: the specification oracle.

Two oracles are kept apart:

    specification    dequantize, multiply in float, quantize: the operators as the ONNX standard defines them. Computed
                     by onnx's ReferenceEvaluator (numpy) and by ONNX Runtime with quantized patterns left unfused.
    integer models   what the fused kernels compute (`validate/integer`), compared bit for bit.

The first says that the file is right: two implementations that share no code agree on it. The second says that the
runtime's kernels are understood. Where a kernel keeps the meaning of its pattern, both agree up to float rounding.

One does not: MatMulNBits at accuracy level 4 quantizes its float input to int8, of which the file says nothing. It
differs from the specification by what 8-bit activations cost (0.2 to 1 % of the largest output on random data), and
only `onnxruntime.dynamic_per_block` is its oracle. At level 0 it is the specification within float rounding.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from afq_export.errors import AfqError, InputError
from afq_export.runtime.onnxruntime import RunOptions, first_line, open_session

UNFUSED = {
    "graph_optimization_level": "extended",
    "session.disable_quant_qdq": "1",
    "session.x64quantprecision": "1",
}
"""Session options under which ONNX Runtime executes quantize and dequantize nodes one by one; the last so that the
MatMulInteger of dynamic_per_token does not saturate (runtime/saturation.py)."""

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Specified:
    """Outputs of one model on one input, by name, from both implementations of the standard."""

    reference: Arrays
    unfused: Arrays

    def error(self) -> float:
        """The largest difference of the two, over the largest value of its output."""
        return max(relative_error(self.unfused[name], expected) for name, expected in self.reference.items())


def specified(model: bytes, inputs: Mapping[str, np.ndarray]) -> Specified:
    """Runs `model`, whose weights are all inside, on `inputs`. For models of a few linears: the reference is slow.

    Raises InputError when either does not run it.
    """
    try:
        evaluator = ReferenceEvaluator(onnx.load(io.BytesIO(model)))
        names = list(evaluator.output_names)
        reference = evaluator.run(names, dict(inputs))
        unfused = open_session(model, RunOptions(UNFUSED)).run(names, dict(inputs))
    except AfqError:
        raise
    except Exception as error:  # neither has an exception of its own for a model that does not run
        raise InputError("the specification cannot be computed", why=first_line(error)) from error
    return Specified(dict(zip(names, reference, strict=True)), dict(zip(names, unfused, strict=True)))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest |found - expected| over the largest |expected|; NaN when there is one, inf when shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference.max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-30))
