"""The rungs against each other where they must agree, and against formulas written another way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from afq_export.arch import decoder
from afq_export.quantize.activations import quantize_static, quantize_tokens
from afq_export.validate.evaluate import hidden_states
from afq_export.validate.integer.linear import integer_linear
from afq_export.validate.rungs import (
    FloatRung,
    ObservedOps,
    fake_quant_rung,
    fake_quantized,
    integer_rung,
    unrounded_codes,
)
from tests.checkpoints import (
    KERNELS,
    KINDS,
    DequantizedWeights,
    random_checkpoint,
    random_linear,
    random_windows,
    small_config,
    xnnpack_target,
)

TARGET = xnnpack_target()


def logits_of(rung, ids):
    with torch.no_grad():
        return decoder.head(rung.head(), hidden_states(rung, ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_integer_and_fake_quant_are_near_each_other(tmp_path, kernel, kind):
    """The same codes; float32 sums against int32 sums, and the static kernel's int32 bias."""
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(kind), kernel)
    ids = random_windows(checkpoint.config).ids_NT
    fake, integer = logits_of(fake_quant_rung(checkpoint), ids), logits_of(integer_rung(checkpoint, TARGET), ids)
    assert integer.shape == (*ids.shape, checkpoint.config.vocab)
    assert (fake - integer).abs().mean() < 0.02 * integer.abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_fake_quant_without_activation_grids_is_the_dequantized_float_model(tmp_path, kind, monkeypatch):
    """Dequantized codes are all that fake quantization does to weights, embedding and lm_head."""
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(kind), "qd8-f32-qb4w")
    ids = random_windows(checkpoint.config).ids_NT
    monkeypatch.setattr("afq_export.validate.rungs.fake_quantized", lambda linear, x: x)
    fake, plain = logits_of(fake_quant_rung(checkpoint), ids), logits_of(FloatRung(DequantizedWeights(checkpoint)), ids)
    assert torch.equal(fake, plain)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_linear_is_the_integer_model_within_float_error(kernel):
    linear, x = random_linear(kernel, 24, 64), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    fake = F.linear(fake_quantized(linear, x).double(), linear.dequantized().double(), linear.bias.double())
    integer = integer_linear(TARGET.kernel(kernel).arithmetic, linear, x).double()
    bound = linear.record.output.scale * 0.51 if linear.record.output else 1e-5
    inside = integer.abs() < 127 * 0.0529 - 2 if linear.record.output else torch.ones_like(integer, dtype=torch.bool)
    assert (fake - integer)[inside].abs().max() < bound


@pytest.mark.parametrize("kernel", KERNELS)
def test_float64_between_the_linears_changes_only_last_bits(tmp_path, kernel):
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(), kernel)
    ids = random_windows(checkpoint.config, count=1).ids_NT
    inputs = []
    for dtype in (torch.float32, torch.float64):
        rung, seen = integer_rung(checkpoint, TARGET, dtype), {}
        with torch.no_grad():
            x = decoder.block(checkpoint.config, ObservedOps(rung.block(0), seen.__setitem__), rung.embed(ids))
        assert x.dtype is dtype
        inputs.append(seen)
    single, double = (seen["q_proj"] for seen in inputs)
    assert double.dtype is torch.float64
    assert torch.allclose(single.double(), double, rtol=1e-5, atol=1e-6)
    assert list(inputs[0]) == list(decoder.family(checkpoint.config).linear_shapes(checkpoint.config))


def test_unrounded_codes_round_to_the_codes():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    before, tokens = unrounded_codes(random_linear("qd8-f32-qc8w"), x), quantize_tokens(x)
    assert torch.equal(before[:, -1:].round(), tokens.zero_point)
    assert torch.equal((before[:, :-1].round() + tokens.zero_point).clamp(-128, 127), tokens.codes)
    linear = random_linear("qs8-qc8w")
    codes = (unrounded_codes(linear, x).round() + linear.record.input.zero_point).clamp(-128, 127)
    assert torch.equal(codes, quantize_static(x, linear.record.input))


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_embedding_rows_are_dequantized(tmp_path, bits):
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(), embedding_bits=bits)
    embedding = checkpoint.embedding()
    row = embedding.codes[5].float() * (1.0 if bits == 32 else embedding.scales[5])
    assert torch.equal(integer_rung(checkpoint, TARGET).embed(torch.tensor([[5]]))[0, 0], row)
