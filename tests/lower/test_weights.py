"""Packed layouts and their inverses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from afq_export.errors import InputError
from afq_export.lower.executorch import weights

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 8).map(lambda half: 2 * half))


@given(SHAPES.flatmap(lambda shape: arrays.arrays(np.int8, shape, elements=st.integers(-8, 7))))
def test_int4_comes_back(codes: np.ndarray) -> None:
    packed = weights.pack_int4(codes)
    assert packed.nbytes == codes.size // 2
    assert np.array_equal(weights.unpack_int4(packed.tobytes(), *codes.shape), codes)


def test_int4_layout() -> None:
    """Even column in the low nibble for XNNPACK, in the high one for the embedding; stored as code + 8."""
    codes = np.array([[-8, 7]], np.int8)
    assert weights.pack_int4(codes).tolist() == [[0xF0]]
    assert weights.pack_embedding_int4(codes).tolist() == [[0x0F]]


@pytest.mark.parametrize("codes", [[[8, 0]], [[-9, 0]], [[1, 2, 3]]])
def test_int4_refuses(codes: list[list[int]]) -> None:
    with pytest.raises(InputError):
        weights.pack_int4(np.array(codes, np.int8))


def test_int2_layout() -> None:
    """Four codes in a byte, the first in the low bits; stored as code + 2."""
    assert weights.pack_embedding_int2(np.array([[-2, -1, 0, 1]], np.int8)).tolist() == [[0b11100100]]


@pytest.mark.parametrize("codes", [[[2, 0, 0, 0]], [[-3, 0, 0, 0]], [[1, 0]]])
def test_int2_refuses(codes: list[list[int]]) -> None:
    with pytest.raises(InputError):
        weights.pack_embedding_int2(np.array(codes, np.int8))


def test_bfloat16_comes_back() -> None:
    scales = np.array([[0.5, 1.0], [0.0078125, 3.0]], np.float32)
    bits = weights.bfloat16_bits(scales)
    assert np.array_equal(weights.from_bfloat16_bits(bits.tobytes(), 2, 2), scales)


def test_a_scale_that_the_kernel_would_round_is_refused() -> None:
    with pytest.raises(InputError, match="bfloat16"):
        weights.bfloat16_bits(np.array([[0.1]], np.float32))


def test_static_bias_is_in_steps_of_one_product() -> None:
    scales = np.array([[0.5], [0.25]], np.float32)
    assert weights.static_bias(np.array([1.0, -1.0]), 0.5, scales).tolist() == [4, -8]
    assert weights.static_bias(np.array([1e30, 0.0]), 0.5, scales).tolist() == [2**31 - 1, 0]
