"""The byte layouts in which XNNPACK keeps integer weights, scales and biases, and their inverses.

Only numpy: nothing here needs ExecuTorch. Shapes: O output features, I input features, G groups along I.
"""

from __future__ import annotations

import numpy as np

from afq_export.errors import InputError

INT4_OFFSET = 8
"""A 4-bit code is stored as the unsigned nibble `code + 8`."""


def pack_int4(codes_OI: np.ndarray) -> np.ndarray:
    """Codes in [-8, 7] to bytes [O, I/2], the even column in the low nibble.

    Raises InputError for an odd I (the kernel computes a wrong row) or a code outside the range.
    """
    if codes_OI.shape[1] % 2:
        raise InputError("int4 weights need an even number of inputs", why=f"got {codes_OI.shape[1]}")
    if codes_OI.min() < -INT4_OFFSET or codes_OI.max() >= INT4_OFFSET:
        raise InputError("a code does not fit 4 bits", why=f"range [{codes_OI.min()}, {codes_OI.max()}]")
    nibbles = (codes_OI.astype(np.int16) + INT4_OFFSET).astype(np.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: bytes, outputs: int, inputs: int) -> np.ndarray:
    """Inverse of `pack_int4`: int8 codes [O, I]."""
    pairs = np.frombuffer(packed, np.uint8).reshape(outputs, inputs // 2)
    nibbles = np.stack((pairs & 0xF, pairs >> 4), axis=-1).reshape(outputs, inputs)
    return nibbles.astype(np.int8) - np.int8(INT4_OFFSET)


def bfloat16_bits(scales_OG: np.ndarray) -> np.ndarray:
    """The upper 16 bits of float32 scales, uint16 [O, G].

    Raises InputError when a scale is not a bfloat16: the kernel would round it, and the integers were made for
    another one.
    """
    words = np.ascontiguousarray(scales_OG, np.float32).view(np.uint32)
    if (words & 0xFFFF).any():
        raise InputError("a group scale is not a bfloat16 number", why="XNNPACK keeps group scales in bfloat16")
    return (words >> 16).astype(np.uint16)


def from_bfloat16_bits(bits: bytes, outputs: int, groups: int) -> np.ndarray:
    """Inverse of `bfloat16_bits`: float32 scales [O, G]."""
    words = np.frombuffer(bits, np.uint16).astype(np.uint32) << 16
    return words.view(np.float32).reshape(outputs, groups)


def static_bias_scales(input_scale: float, scales_O: np.ndarray) -> np.ndarray:
    """The grid of a static kernel's int32 bias: `input scale * weight scale`, float32 [O]."""
    return np.float32(input_scale) * scales_O.astype(np.float32).reshape(-1)


def static_bias(bias_O: np.ndarray, input_scale: float, scales_O: np.ndarray) -> np.ndarray:
    """`rint(bias * (1 / (input scale * weight scale)))` as int32 [O], in float32 as ExecuTorch's own lowering does."""
    steps = np.rint(bias_O.astype(np.float32) * (np.float32(1) / static_bias_scales(input_scale, scales_O)))
    limits = np.iinfo(np.int32)
    return np.clip(steps.astype(np.float64), limits.min, limits.max).astype(np.int32)


def pack_embedding_int2(codes_VD: np.ndarray) -> np.ndarray:
    """Token rows for ExecuTorch's 2-bit embedding: bytes [V, D/4] of `code + 2`, the first of four in the low bits.

    Raises InputError unless D is a multiple of 4 and every code in [-2, 1].
    """
    if codes_VD.shape[1] % 4:
        raise InputError("int2 rows need a multiple of 4 columns", why=f"got {codes_VD.shape[1]}")
    if codes_VD.min() < -2 or codes_VD.max() > 1:
        raise InputError("a code does not fit 2 bits", why=f"range [{codes_VD.min()}, {codes_VD.max()}]")
    parts = (codes_VD + 2).astype(np.uint8)
    return np.bitwise_or.reduce([parts[:, place::4] << 2 * place for place in range(4)])


def pack_embedding_int4(codes_VD: np.ndarray) -> np.ndarray:
    """Token rows for ExecuTorch's own 4-bit embedding: bytes [V, D/2], the even column in the *high* nibble.

    Raises InputError as `pack_int4` does.
    """
    swapped = pack_int4(codes_VD)
    return (swapped >> 4) | (swapped << 4)
