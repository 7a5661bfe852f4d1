"""The learning step's own operations: results of the plain ones, bit for bit, and their gradients to rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.arch.attention import apply_rope, causal_attention, rope_tables
from afq_export.arch.config import Rope
from afq_export.calibrate import attention, fused
from afq_export.calibrate.attention import attention_in_parts
from afq_export.calibrate.fused import divergence, rms_norm, rotate, squared_errors
from afq_export.calibrate.ops import on_own_grid
from afq_export.quantize.activations import fake_quantize_dynamic
from afq_export.spec.quant import Granularity, QuantSpec


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def both(fused: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], ...]:
    """The result and the gradients of two functions."""
    found = []
    for function in (fused, plain):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y = function(*leaves)
        (y * random(*y.shape)).sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    return tuple(found)


def hold(found: tuple[list[Tensor], ...]) -> None:
    (y, *grads), (expected, *others) = found
    assert torch.equal(y, expected)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-6)


def test_norm() -> None:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    hold(both(lambda x, weight: rms_norm(x, weight, 1e-5), plain, random(2, 7, 24), random(24)))


def test_norm_of_what_is_not_learned() -> None:
    weight = random(24).requires_grad_()
    rms_norm(random(3, 24), weight, 1e-5).sum().backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all()


def test_rotation() -> None:
    tables = rope_tables(Rope((1.0, 0.3, 0.01)), torch.arange(5))
    hold(both(lambda x: rotate(x, *tables), lambda x: apply_rope(x, *tables), random(2, 5, 3, 6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [1, 3 * 40, 1 << 22])
def test_divergence(numbers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in parts of one, of three, and all together; their gradients in the logits' precision."""
    monkeypatch.setattr(fused, "DISTRIBUTIONS", numbers)
    wanted, found = (3 * random(2, 5, 40)).to(dtype), (3 * random(2, 5, 40).flip(-1)).to(dtype)
    leaves = [found.clone().requires_grad_() for _ in range(2)]
    loss = divergence(wanted, leaves[0])
    plain = F.kl_div(
        leaves[1].float().log_softmax(-1), wanted.float().log_softmax(-1), reduction="sum", log_target=True
    )
    for each in (loss, plain / 10):
        (0.25 * each).backward()
    loss, plain = float(loss.detach()), float(plain.detach()) / 10
    assert loss == pytest.approx(plain, rel=1e-6) and loss > 1
    torch.testing.assert_close(
        leaves[0].grad, leaves[1].grad, rtol=2**-7 if dtype is torch.bfloat16 else 1e-4, atol=1e-7
    )
    with torch.no_grad():
        assert float(divergence(wanted, found)) == loss


@pytest.mark.parametrize("count", [1, 2])
def test_squared_errors(count: int) -> None:
    targets = tuple(random(3, 5, 8 + i)[..., :8] for i in range(count))
    weights = random(3, 5, 1).abs()

    def plain(y: Tensor) -> Tensor:
        return sum(((y - target).square() * weights).mean() for target in targets) / count

    hold(both(lambda y: squared_errors(y, targets, weights), plain, random(3, 5, 8)))


@pytest.mark.parametrize("spec", [QuantSpec(8, Granularity.PER_TOKEN, symmetric=False, dynamic=True)])
def test_rows_on_their_own_grids(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many parts as there are rows, too; bfloat16 is a cast of the same numbers."""
    x = random(2, 9, 40)
    for cached in (1, 100, 1 << 20):
        monkeypatch.setattr("afq_export.calibrate.ops.CACHED", cached)
        assert torch.equal(on_own_grid(x, spec, torch.float32), fake_quantize_dynamic(x, spec))
    assert torch.equal(on_own_grid(x, spec, torch.bfloat16), fake_quantize_dynamic(x, spec).bfloat16())
    turned = x.transpose(0, 1)
    assert torch.equal(on_own_grid(turned, spec, torch.float32), fake_quantize_dynamic(turned, spec))
    found = both(lambda x: on_own_grid(x, spec, torch.float32), lambda x: fake_quantize_dynamic(x, spec), x)
    assert torch.equal(found[0][1], found[1][1]), "gradients pass unchanged"


@pytest.mark.parametrize(("tokens", "rows", "kv_heads"), [(7, 3, 2), (8, 4, 4), (5, 128, 1)])
def test_attention_in_parts(tokens: int, rows: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ROWS", rows)
    sizes = [(2, tokens, heads, 6) for heads in (4, kv_heads, kv_heads)]
    inputs = [random(*size) + i for i, size in enumerate(sizes)]
    ours, plain = both(lambda *qkv: attention_in_parts(*qkv, torch.float32), causal_attention, *inputs)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    halves = attention_in_parts(*inputs, torch.bfloat16)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), plain[0], rtol=0.03, atol=0.03)
