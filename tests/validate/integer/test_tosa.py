"""The operators of TOSA against their definitions in Python's integers, and the linear against a sum by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afq_export.errors import InputError
from afq_export.lower.tosa.graph import Operator, TosaGraph
from afq_export.quantize.activations import quantize_static
from afq_export.quantize.checkpoint import LinearRecord, QuantizedLinear, StaticRange
from afq_export.validate.integer.tosa import evaluate, fits, leading_zeros, rescale, run_graph, static, table
from tests.checkpoints import linear_spec

INT32 = st.integers(-(2**31), 2**31 - 1)


@given(st.data(), st.integers(2, 62), st.integers(0, 2**31 - 1), st.integers(-128, 127), st.integers(-128, 127))
def test_rescale(data: st.DataObject, shift: int, multiplier: int, zero: int, output_zero: int) -> None:
    limit = min(1 << (shift - 1), 1 << 31)
    value = data.draw(st.integers(-limit, limit - 1))
    found = rescale(np.array([value + zero]), np.array([multiplier]), np.array([shift]), -128, 127, zero, output_zero)
    expected = ((value * multiplier + (1 << (shift - 1))) >> shift) + output_zero
    assert found[0] == max(-128, min(127, expected))


def test_rescale_rounds_once_and_halves_up() -> None:
    half = np.array([1 << 30]), np.array([31])  # times 0.5
    assert rescale(np.array([1, -1, 3, -3, 5]), *half, -128, 127).tolist() == [1, 0, 2, -1, 3]
    # In two roundings (TOSA's DOUBLE_ROUND) -1 would be -1: what is added depends on the sign there.


@pytest.mark.parametrize(
    ("shift", "multiplier", "value"), [(1, 1, 0), (63, 1, 0), (8, -1, 0), (8, 1, 128), (8, 1, -129)]
)
def test_rescale_refuses_what_is_unpredictable(shift: int, multiplier: int, value: int) -> None:
    with pytest.raises(InputError):
        rescale(np.array([value]), np.array([multiplier]), np.array([shift]), -128, 127)


@given(st.integers(0, 2**32), st.integers(-32768, 32767))
def test_table(seed: int, x: int) -> None:
    entries = np.random.default_rng(seed).integers(-(2**14), 2**14, 513).tolist()
    index, fraction = (x + 32768) // 128, (x + 32768) % 128
    expected = entries[index] * 128 + (entries[index + 1] - entries[index]) * fraction
    assert table(np.array([x], np.int16), np.array(entries, np.int16))[0] == expected


def test_a_slope_of_more_than_16_bits_is_refused() -> None:
    with pytest.raises(InputError, match="slope"):
        table(np.array([0], np.int16), np.array([-32768, 32767] * 256 + [0], np.int16))


@given(INT32)
def test_leading_zeros(value: int) -> None:
    assert leading_zeros(np.array([value], np.int32))[0] == 32 - (value & 0xFFFFFFFF).bit_length()


def test_a_value_outside_of_its_type_is_named() -> None:
    graph = TosaGraph("blocks.1.attention")
    x = graph.input("x", "i32", (1, 2))
    graph.output(graph.add(x, x), "y")
    with pytest.raises(InputError, match=r"a value leaves its type \[blocks.1.attention.add\]: .* in i32"):
        run_graph(graph, {"x": np.array([[1, 2**30]], np.int32)})


def test_an_unknown_operator_is_refused() -> None:
    with pytest.raises(InputError, match="no model of the operator"):
        evaluate(Operator("ERF", ("x",), "y"), [np.zeros(1)], "i8")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("output", [StaticRange(0.05, 11), StaticRange(3e-4, -700, 16)])
def test_the_linear_is_its_sum_by_hand(bits: int, output: StaticRange) -> None:
    random = torch.Generator().manual_seed(bits)
    spec = linear_spec("qs8-qc8w", "blocks.0.q_proj", 5, 7, True)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, 7), dtype=torch.int8, generator=random)
    scales = 0.01 * (0.5 + torch.rand(5, 1, generator=random))
    source = StaticRange(0.03, -7)
    linear = QuantizedLinear(
        LinearRecord(spec, "CONV2D", source, output), codes, scales, torch.randn(5, generator=random)
    )
    x = torch.randn(40, 7, generator=random)
    found = static(linear, x)
    step, zero = (output.scale, output.zero_point) if output.bits == 8 else ((32767 + 700) * output.scale / 32767, 0)
    for token, row in enumerate(quantize_static(x, source).long().tolist()):
        for channel in range(5):
            unit = source.scale * float(scales[channel, 0])
            total = sum((code + 7) * int(weight) for code, weight in zip(row, codes[channel], strict=True))
            total += round(float(linear.bias[channel]) / unit)
            factor, shift = unit / step, 0
            while factor < 2**30:  # 31 significant bits, one rounding
                factor, shift = factor * 2, shift + 1
            code = ((total * round(factor) + (1 << (shift - 1))) >> shift) + zero
            code = max(output.qmin, min(output.qmax, code))
            assert found[token, channel] == np.float32(code - zero) * np.float32(step)


def test_an_accumulator_beyond_32_bits_is_refused() -> None:
    with pytest.raises(InputError, match="leaves its type"):
        fits(np.array([2.0**31]), "i32")
