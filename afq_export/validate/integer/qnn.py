"""The linears that Qualcomm's HTP runs, in integers, as its simulator computes them (QNN SDK 2.51, HTP v75).

    8-bit activations    acc  = sum of c * w - sum of z * w           c, z: unsigned codes, their zero point
    16-bit activations   acc  = 256 * (floor(sum of c * w / 256) - floor(sum of z * w / 256 + 1/2))
                         code = clamp(rint(acc * sx * sw / sy) + zy)                   float64, half to even

With 16 bits the last byte of the sum is cut off before it is scaled, and the zero point's part is rounded by itself,
half upwards: where a step of the output is a small part of 256 * sx * sw, that is more than its own rounding. In LPBQ w
is the code times its group's step. The formula was found by comparing with the simulator, not stated by the vendor: at
most one step of the output remains (tests/validate/test_qnn.py), which the target file allows for its architecture.
"""

from __future__ import annotations

from torch import Tensor

from afq_export.quantize.activations import dequantize_static, quantize_static
from afq_export.quantize.checkpoint import QuantizedLinear, StaticRange
from afq_export.quantize.grid import block_steps
from afq_export.validate.integer.dot import input_grid, output_grid

CUT = 256
"""What the accumulator of 16-bit activations is divided by before anything else."""


def static(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """Codes in, codes out, dequantized: float32 [T, O]."""
    source, target = input_grid(linear), output_grid(linear)
    weights_OI, scales_O = whole_weights(linear)
    sums_TO = product(quantize_static(x_TI, source), weights_OI.t(), source)
    steps_TO = sums_TO * (source.scale * scales_O.double() / target.scale)
    codes_TO = (steps_TO.round() + target.zero_point).clamp(target.qmin, target.qmax)
    return dequantize_static(codes_TO.float(), target)


def product(codes: Tensor, weights: Tensor, grid: StaticRange) -> Tensor:
    """(signed codes [.., T, I] on `grid`, minus its zero point) times whole weights float64 [.., I, O]: the sums."""
    sums = (codes - grid.qmin).double() @ weights
    zeros = (grid.zero_point - grid.qmin) * weights.sum(-2, keepdim=True)
    if grid.bits <= 8:
        return sums - zeros
    return CUT * ((sums / CUT).floor() - (zeros / CUT + 0.5).floor())


def whole_weights(linear: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Whole numbers in float64 [O, I], and the float32 scale [O] of each row."""
    group = linear.spec.weight.group
    if not group:
        return linear.codes.double(), linear.scales[:, 0]
    steps_OG, unit_O1 = block_steps(linear.scales)
    steps_OI = steps_OG.double().repeat_interleave(group, dim=1)[:, : linear.codes.shape[1]]
    return linear.codes.double() * steps_OI, unit_O1[:, 0]
