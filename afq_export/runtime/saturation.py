"""Whether this machine's integer kernels saturate: x86 with AVX2 or AVX-512 but without VNNI.

There ONNX Runtime multiplies uint8 activations by int8 weights with an instruction that adds pairs of products in
int16: 2 * 255 * 127 does not fit and is cut to 32767, without a word. `session.x64quantprecision` is the remedy:
weights become uint8 and another, slower instruction is taken. Whether it is needed, and whether it helps, is seen by
running the worst case: every pattern that our files have, weights and activations at the ends of their grids, against
exact integers.

The extreme inputs are whole codes on every grid here (+1 and -1 are codes 127 and -127), so that nothing but the sums
can differ. Measured with ONNX Runtime 1.31.1 and QEMU 7.2's Haswell: without the remedy the first three patterns are
off by 99 % of the largest output, with it none is; MatMulNBits never is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from afq_export.runtime.onnxruntime import RunOptions, open_session

INPUTS, OUTPUTS, GROUP = 160, 41, 32
"""Sizes of the worst case, with columns left over by any width of vector."""
TOLERANCE = 1e-4
"""Largest error over the largest output that is no saturation: MatMulNBits adds float32 numbers in an unknown order."""
STATIC, REQUANTIZED, INTEGER = "static_to_float", "static_requantized", "dynamic_per_token"
BLOCKS = {"dynamic_per_block int4": (4, ml_dtypes.int4), "dynamic_per_block int8": (8, np.int8)}
PATTERNS = (STATIC, REQUANTIZED, INTEGER, *BLOCKS)

Run = Callable[[bytes, dict[str, np.ndarray]], dict[str, np.ndarray]]
"""A model and its inputs -> its outputs by name."""


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """One model with an output per pattern, `x` [1, T, I] and what is exactly right, [1, T, O] by pattern."""

    model: bytes
    x: np.ndarray
    expected: Mapping[str, np.ndarray]


def saturating(session: Mapping[str, str], run: Run | None = None) -> dict[str, float]:
    """The patterns that come out wrong under the `session` options: name -> error over the largest right output.

    Empty: this machine computes what the integer models say. One token and several are tried, which take different
    kernels. `run` stands in for ONNX Runtime on this machine. Raises as `open_session` does.
    """
    case, wrong = worst_case(), {}
    run = run or _runtime(session)
    for tokens in (slice(0, 1), slice(1, 2), slice(0, None)):
        found = run(case.model, {"x": case.x[:, tokens]})
        for pattern, expected in case.expected.items():
            error = np.abs(found[pattern].astype(np.float64) - expected[:, tokens]).max()
            relative = float(error / np.abs(expected).max())
            # Written so that a NaN is an error.
            if not relative <= TOLERANCE:
                wrong[pattern] = max(relative, wrong.get(pattern, 0.0))
    return wrong


def worst_case() -> WorstCase:
    """Weights of 127 and -127 (7 and -8 in 4 bits), activations of 1 and -1, alike, alternating and random."""
    random = np.random.default_rng(0)
    signs_KN = random.choice([-1, 1], (INPUTS, OUTPUTS))
    signs_KN[:, 0], signs_KN[:, 1], signs_KN[::2, 2], signs_KN[1::2, 2] = 1, -1, 1, -1
    x = random.choice([-1.0, 1.0], (1, 7, INPUTS)).astype(np.float32)
    x[0, 0], x[0, 1], x[0, 2, ::2], x[0, 2, 1::2] = 1, -1, 1, -1
    scales_N = (2.0 ** -random.integers(4, 7, OUTPUTS)).astype(np.float32)
    whole = (127 * signs_KN).astype(np.int8)
    sums = x.astype(np.int64) @ whole.astype(np.int64)
    expected = {name: sums * scales_N.astype(np.float64) for name in (STATIC, REQUANTIZED, INTEGER)}
    # Sums are 127 times a whole number up to INPUTS: on this step none is near a tie, which is another question.
    step = float(np.abs(expected[REQUANTIZED]).max()) / 126.7
    expected[REQUANTIZED] = np.rint(expected[REQUANTIZED] / np.float32(step)) * np.float32(step)
    writer = _Writer(scales_N, np.float32(step))
    writer.static(whole)
    writer.per_token(whole)
    for name, (bits, stored) in BLOCKS.items():
        codes = np.where(signs_KN > 0, (1 << (bits - 1)) - 1, -(1 << (bits - 1)))
        expected[name] = (x.astype(np.int64) @ codes) * scales_N.astype(np.float64)
        writer.blockwise(name, codes.astype(stored))
    return WorstCase(writer.model(), x, expected)


class _Writer:
    """Writes the patterns of lower/onnx/linears.py on one input; all weights have the scales `scales_N`."""

    def __init__(self, scales_N: np.ndarray, step: np.float32) -> None:
        self.scales_N = scales_N
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self._constant("scales", scales_N)
        self._constant("unit", np.float32(1) / np.float32(127))
        self._constant("middle", np.array(128, np.uint8))
        self._constant("output_step", step)

    def static(self, codes_KN: np.ndarray) -> None:
        """One input grid, and the result left in float and put on a grid."""
        self._node("QuantizeLinear", ["x", "unit", "middle"], "codes")
        self._node("DequantizeLinear", ["codes", "unit", "middle"], "values")
        for name in (STATIC, REQUANTIZED):
            # Zero points of their own: the remedy renames them, and fails on a name that it has renamed before.
            zeros = self._constant(f"{name}.zeros", np.zeros(len(self.scales_N), np.int8))
            weight = [self._constant(f"{name}.codes", codes_KN), "scales", zeros]
            self._node("DequantizeLinear", weight, f"{name}.weight", axis=1)
            last = name if name == STATIC else f"{name}.sums"
            self._node("MatMul", ["values", f"{name}.weight"], last)
        self._node("QuantizeLinear", [f"{REQUANTIZED}.sums", "output_step", "middle"], f"{REQUANTIZED}.rounded")
        self._node("DequantizeLinear", [f"{REQUANTIZED}.rounded", "output_step", "middle"], REQUANTIZED)

    def per_token(self, codes_KN: np.ndarray) -> None:
        """uint8 codes, made by QuantizeLinear as well: how they come about makes no difference to the product."""
        self._node("MatMulInteger", ["codes", self._constant("integer.codes", codes_KN), "middle"], "integer.sums")
        self._node("Cast", ["integer.sums"], "integer.float", to=TensorProto.FLOAT)
        self._node("Mul", ["integer.float", "unit"], "integer.steps")
        self._node("Mul", ["integer.steps", "scales"], INTEGER)

    def blockwise(self, name: str, codes_KN: np.ndarray) -> None:
        """Scales [G, N] and zero points along the inputs."""
        shape = (INPUTS // GROUP, OUTPUTS)
        scales = self._constant(f"{name}.scales", np.broadcast_to(self.scales_N, shape))
        zeros = self._constant(f"{name}.zeros", np.zeros(shape, codes_KN.dtype))
        weight = [self._constant(f"{name}.codes", codes_KN), scales, zeros]
        self._node("DequantizeLinear", weight, f"{name}.weight", axis=0, block_size=GROUP)
        self._node("MatMul", ["x", f"{name}.weight"], name)

    def model(self) -> bytes:
        """All patterns, dynamic in batch and sequence as our files are."""
        outputs = [_value(name, OUTPUTS) for name in PATTERNS]
        graph = helper.make_graph(self.nodes, "worst_case", [_value("x", INPUTS)], outputs, self.tensors)
        opsets = [helper.make_opsetid("", 21)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def _constant(self, name: str, array: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: object) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))


def _value(name: str, size: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", size])


def _runtime(session: Mapping[str, str]) -> Run:
    def run(model: bytes, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(PATTERNS, open_session(model, RunOptions(session)).run(list(PATTERNS), inputs), strict=True))

    return run
