"""Reads a finished program back: the constants that its linear kernels are called with."""

from __future__ import annotations

import math
import struct

import numpy as np
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import Double, Int, KernelCall, Null, Program
from executorch.exir.schema import Tensor as StoredTensor

from afq_export.errors import InputError
from afq_export.lower.stored import StoredLinear
from afq_export.quantize.checkpoint import StaticRange
from afq_export.runtime.executorch import HEADER_SIZE, check_program_header

CONVOLUTION, ROWS = "cortex_m::quantized_conv2d", "quantized_decomposed::dequantize_per_channel"
QUANTIZE, DEQUANTIZE = "cortex_m::quantize_per_tensor", "cortex_m::dequantize_per_tensor"
DTYPES = {0: np.uint8, 1: np.int8, 3: np.int32, 4: np.int64, 6: np.float32}
"""ExecuTorch's number of an element type -> numpy's."""


def read_linears(pte: bytes) -> list[StoredLinear]:
    """Linears in running order. Raises InputError when `pte` is no program of this package."""
    check_program_header(pte[:HEADER_SIZE], len(pte), "program in memory")
    try:
        return _Reader(deserialize_pte_binary(pte).program).linears()
    except (struct.error, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError("not a program of this package", why=str(error)) from error


def operators(pte: bytes) -> dict[str, int]:
    """How often each operator is called."""
    reader = _Reader(deserialize_pte_binary(pte).program)
    found: dict[str, int] = {}
    for name, _ in reader.calls:
        found[name] = found.get(name, 0) + 1
    return found


class _Reader:
    def __init__(self, program: Program) -> None:
        self.plan, self.buffers = program.execution_plan[0], program.constant_buffer
        names = [operator.name for operator in self.plan.operators]
        instructions = [instruction.instr_args for chain in self.plan.chains for instruction in chain.instructions]
        self.calls = [(names[call.op_index], call.args) for call in instructions if isinstance(call, KernelCall)]

    def linears(self) -> list[StoredLinear]:
        """What each convolution stands between gives its grids; the head's rows are a linear without any."""
        found, source = [], None
        pending: list[StoredLinear] = []
        for name, args in self.calls:
            if name == QUANTIZE:
                source = self.grid(args)
            elif name == CONVOLUTION:
                pending.append(self.convolution(args, source))
            elif name == DEQUANTIZE and pending:
                linear, target = pending.pop(0), self.grid(args)
                if self.number(args[2]) != target.zero_point:
                    raise ValueError("a grid without a zero point")
                found.append(StoredLinear(linear.kind, linear.codes, linear.scales, linear.bias, linear.input, target))
            elif name == ROWS:
                codes = self.array(args[0])
                found.append(StoredLinear("dequantize_per_channel", codes, self.array(args[1])[:, None]))
        return found

    def convolution(self, args: list[int], source: StaticRange | None) -> StoredLinear:
        codes, bias = self.array(args[1]), self.value(args[2])
        if source is None or self.number(args[6]) != -source.zero_point:
            raise ValueError("a convolution whose input is on another grid")
        numbers = np.stack((self.array(args[8]), self.array(args[9])), -1)
        stored = None if isinstance(bias, Null) else self.array(args[2])
        return StoredLinear("quantized_conv2d", codes[:, 0, 0], numbers, stored, source)

    def grid(self, args: list[int]) -> StaticRange:
        return StaticRange(float(self.number(args[1])), int(self.number(args[2])))

    def value(self, index: int):
        return self.plan.values[index].val

    def number(self, index: int) -> float:
        value = self.value(index)
        if isinstance(value, Double):
            return value.double_val
        if isinstance(value, Int):
            return value.int_val
        raise ValueError(f"not a number: {type(value).__name__}")

    def array(self, index: int) -> np.ndarray:
        value = self.value(index)
        if not isinstance(value, StoredTensor) or not value.data_buffer_idx:
            raise ValueError("a number of a linear is computed, not stored")
        dtype, stored = DTYPES[int(value.scalar_type)], self.buffers[value.data_buffer_idx].storage
        # What is read reaches to where the next constant starts: some bytes of alignment may follow the numbers.
        return np.frombuffer(stored, dtype, math.prod(value.sizes)).reshape(value.sizes)
