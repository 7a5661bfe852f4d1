"""The quantized KV cache against a slow, obvious oracle: one number, one float32 operation at a time."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afq_export.arch.attention import causal_attention
from afq_export.calibrate.ops import QuantizedPathOps
from afq_export.quantize.activations import LEAST_LARGEST
from afq_export.quantize.cache import cache_facts, cached, quantize_cache, row_bytes, token_bytes
from afq_export.quantize.checkpoint import open_checkpoint
from afq_export.report.tables import cache_line
from afq_export.spec.cache import Cache
from afq_export.spec.catalog import load_target
from afq_export.spec.recipe import FLOAT_CACHE, KvCache
from afq_export.validate.rungs import TorchParts, fake_quant_rung, integer_rung
from tests.checkpoints import random_checkpoint, small_config, xnnpack_target

f = np.float32
CACHES = (KvCache(8), KvCache(4), KvCache(8, 4), KvCache(4, 4), KvCache(4, 8))


def oracle(row: np.ndarray, cache: KvCache) -> tuple[list[int], list[np.float32], list[np.float32], list[np.float32]]:
    """Codes, steps, minima and values of one head of one token."""
    size, most_steps = cache.group or len(row), f(2**cache.bits - 1)
    codes, steps, minima, values = [], [], [], []
    for start in range(0, len(row), size):
        group = row[start : start + size]
        least = min(group)
        step = f(max(f(max(group) - least), f(LEAST_LARGEST)) / most_steps)
        found = [round(float(f(f(x - least) / step))) for x in group]
        codes, steps, minima = codes + found, [*steps, step], [*minima, least]
        values += [f(f(f(code) * step) + least) for code in found]
    return codes, steps, minima, values


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31), cache=st.sampled_from(CACHES), exponent=st.integers(-60, 30), offset=st.integers(0, 100)
)
def test_every_bit_is_the_oracles(seed: int, cache: KvCache, exponent: int, offset: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 3, 8, generator=random) + offset) * 2.0**exponent
    rows = quantize_cache(x, cache)
    values, packed = rows.dequantized(), rows.packed(cache.bits)
    assert packed.shape[-1] == row_bytes(cache, 8)
    for place in np.ndindex(2, 3):
        codes, steps, minima, expected = oracle(x[place].numpy(), cache)
        assert min(codes) >= 0 and max(codes) < 2**cache.bits
        assert rows.codes[place].flatten().tolist() == codes
        assert values[place].tolist() == expected
        half = len(codes) // 2
        pairs = [low | high << 4 for low, high in zip(codes[:half], codes[half:], strict=True)]
        tail = struct.pack(f"<{2 * len(steps)}f", *steps, *minima)
        assert bytes(packed[place].tolist()) == bytes(codes if cache.bits == 8 else pairs) + tail


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-30, 1e30])
def test_a_constant_head_comes_back_as_it_is(value: float) -> None:
    x = torch.full((1, 2, 1, 8), value)
    assert torch.equal(cached(x, KvCache(4)), x)


def test_a_float_cache_is_no_operation_and_gradients_pass() -> None:
    x = torch.randn(1, 3, 2, 8, requires_grad=True)
    assert cached(x, FLOAT_CACHE) is x
    cached(x, KvCache(4)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_bytes_are_counted() -> None:
    config = small_config(layers=2, kv_heads=2, head_dim=16)
    sizes = {KvCache(32): 64, KvCache(8): 24, KvCache(4): 16, KvCache(4, 8): 24}
    assert {cache: token_bytes(cache, config) for cache in sizes} == {c: 8 * size for c, size in sizes.items()}
    facts = cache_facts(KvCache(4), config, load_target("linux-x64-ort"))
    assert facts == Cache(bits=4, group=0, token_bytes=128, float_token_bytes=512)
    assert cache_facts(FLOAT_CACHE, config, load_target("ios-coreml")) is None
    line = "int4, a grid per token and head: 0.13 MB per 1,000 tokens, 25.0% of float32's 0.51 MB"
    assert cache_line(facts) == line
    assert cache_line(Cache(32, 0, 512, 512)) == "float32, 0.51 MB per 1,000 tokens"


@pytest.mark.parametrize("cache", [KvCache(8), KvCache(4, 8)])
def test_calibration_and_both_rungs_attend_over_the_cache(tmp_path, cache: KvCache) -> None:
    """One definition everywhere: the oracle's values go into plain attention."""
    config = small_config(layers=1)
    checkpoint = random_checkpoint(tmp_path / "quantized", config, kv_cache=cache)
    assert open_checkpoint(tmp_path / "quantized").kv_cache == cache
    shape = (2, 5, config.kv_heads, config.head_dim)
    q, k, v = torch.randn(2, 5, config.heads, config.head_dim), torch.randn(shape), torch.randn(shape)
    expected = causal_attention(q, *(torch.tensor(_values(x, cache)).view(shape) for x in (k, v)))
    path = QuantizedPathOps(config, {}, {}, kv_cache=cache)
    rungs = fake_quant_rung(checkpoint), integer_rung(checkpoint, xnnpack_target(), parts=TorchParts())
    for attends in (path, *rungs):
        with torch.no_grad():
            assert torch.equal(attends.attend(q, k, v), expected)
    torch.testing.assert_close(path.attend(q, k, v), expected)  # in parts, where something is learned
    assert not torch.equal(causal_attention(q, k, v), expected)


def test_a_checkpoint_with_a_float_cache_says_nothing_of_it(tmp_path) -> None:
    """The bytes of checkpoints made before there were others."""
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(layers=1))
    assert "kv_cache" not in (tmp_path / "quantized" / "quant.json").read_text()
    assert checkpoint.kv_cache == FLOAT_CACHE


def _values(x: torch.Tensor, cache: KvCache) -> np.ndarray:
    return np.array([oracle(row, cache)[3] for row in x.flatten(0, -2).numpy()])
