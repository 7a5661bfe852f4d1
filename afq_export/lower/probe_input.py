"""What a linear that is run alone is given, whatever the runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from afq_export.errors import InputError
from afq_export.quantize.checkpoint import QuantizedLinear


def probe_input(linear: QuantizedLinear, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """`inputs[name]` of the linear as float32 [T, I]. Raises InputError when it is missing or does not fit."""
    name, width = linear.spec.name, linear.spec.inputs
    if name not in inputs:
        raise InputError("no input for a linear", where=name)
    array = np.ascontiguousarray(inputs[name], np.float32)
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        raise InputError("an input does not fit its linear", where=name, why=f"{array.shape}, not [T, {width}]")
    return array
