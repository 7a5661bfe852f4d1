"""The integer models against the real XNNPACK kernels, on random data and on data that is chosen to break them."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from afq_export.quantize.activations import quantize_static
from afq_export.quantize.checkpoint import StaticRange
from afq_export.validate.integer.linear import integer_linear
from tests.checkpoints import KERNELS, hostile_weights, random_linear, xnnpack_target
from tests.validate.xnnpack_programs import MAX_TOKENS, compile_linears

pytest.importorskip("executorch", reason="the runtime is not installed")

KERNEL = {kernel.name: kernel for kernel in xnnpack_target().kernels}
SHAPES = {
    "qd8-f32-qc8w": [(48, 64), (33, 33), (20, 172), (17, 1536)],
    "qd8-f32-qc4w": [(48, 64), (33, 34), (20, 172), (17, 1536)],
    "qd8-f32-qb4w": [(48, 64), (33, 96), (20, 384), (17, 1536)],
    "qs8-qc8w": [(48, 64), (33, 33), (20, 172), (17, 1536)],
}
GROUPS = [32, 96, 128, 32]


def hostile_inputs(inputs: int) -> Tensor:
    """Rows that sit on the edges of the dynamic quantization: [M, I]."""
    random = torch.Generator().manual_seed(inputs)
    noise = torch.randn(40, inputs, generator=random)
    unit = torch.linspace(-128, 127, inputs)  # range -128..127: scale exactly 1
    outlier = noise[0].clone()
    outlier[inputs // 2] = 1e4
    rows = [
        torch.zeros(inputs),
        torch.ones(inputs),
        -torch.ones(inputs),
        torch.full((inputs,), 3.7e-3),
        noise[1].abs(),
        -noise[2].abs(),
        -noise[3].abs() - 100,
        outlier,
        -outlier,
        unit,
        (unit.round() + 0.5).clamp(-128, 127),  # every value a tie of round()
        (unit.round() + 0.5).clamp(-128, 127).flip(0) * 2**-9,
        torch.where(torch.arange(inputs) % 2 == 0, 1.0, -1.0),
        torch.where(torch.arange(inputs) % 3 == 0, 255.0, 0.0),
        noise[4] * 1e-30,
        noise[5] * 1e30,
        (noise[6] * 8).round() / 8,
        (noise[7] * 64).round(),
        noise[8] ** 5,
    ]
    return torch.cat([torch.stack(rows), noise[len(rows) :] * 10.0 ** torch.linspace(-3, 3, 40 - len(rows))[:, None]])


@pytest.fixture(scope="module", params=KERNELS)
def compiled(request):
    """Eight linears of one kernel (four shapes, with and without bias) in one program."""
    kernel = request.param
    linears = [
        hostile_weights(random_linear(kernel, *shape, bias=bias, group=group, seed=number))
        for number, (shape, group) in enumerate(zip(SHAPES[kernel], GROUPS, strict=True))
        for bias in (True, False)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and ExecuTorch's own deprecations
        return KERNEL[kernel], linears, compile_linears(linears)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_model_is_the_kernel(compiled, tokens):
    kernel, linears, run = compiled
    inputs = [hostile_inputs(linear.spec.inputs) for linear in linears]
    for start in range(0, 40, tokens):
        part = [x[start : start + tokens] for x in inputs]
        for linear, x, theirs in zip(linears, part, run(part), strict=True):
            ours = integer_linear(kernel.arithmetic, linear, x)
            where = f"{kernel.name} {tuple(linear.codes.shape)} bias {linear.bias is not None} rows {start}.."
            assert_same(kernel, ours, theirs, where)


def assert_same(kernel, ours: Tensor, theirs: Tensor, where: str) -> None:
    """Equal bit for bit; where the float order is not the modelled one (other instruction sets), within the bound."""
    assert torch.isfinite(theirs).all(), where
    if kernel.max_relative_error and not runs_avx512_vnni():
        assert (ours - theirs).abs().max() <= kernel.max_relative_error * theirs.abs().max(), where
    else:
        different = (ours != theirs).nonzero()
        assert not len(different), f"{where}: {len(different)} of {ours.numel()} differ, first {different[0].tolist()}"


def runs_avx512_vnni() -> bool:
    """Whether XNNPACK takes the kernel whose float order the per-group model has."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_vnni" in cpuinfo.read_text()


def test_static_ties_follow_the_kernel():
    """Inputs and accumulators that fall exactly between two codes: the rounding rule itself is compared."""
    grids = {"input": StaticRange(scale=0.125, zero_point=3), "output": StaticRange(scale=0.5, zero_point=-1)}
    linear = random_linear("qs8-qc8w", 16, 32)
    record = msgspec.structs.replace(linear.record, **grids)
    linear = dataclasses.replace(linear, record=record, scales=torch.full((16, 1), 0.125))
    x = (torch.arange(32 * 32).view(32, 32) % 251 - 125) / 16  # x / scale is a half at every odd number
    assert ((x / 0.125) % 1 == 0.5).float().mean() > 0.4
    sums = (quantize_static(x, record.input) - 3) @ linear.codes.float().t()
    assert (((sums + (linear.bias * 64).round()) / 32) % 1 == 0.5).float().mean() > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [theirs] = compile_linears([linear])([x])
    assert torch.equal(integer_linear("xnnpack.static_per_channel", linear, x), theirs)


def test_static_input_multiplies_by_the_float32_reciprocal():
    """Floats next to the ties of a scale that is no power of two: division or float64 would give other codes."""
    scale = 1 / 3
    grid = StaticRange(scale=scale, zero_point=3)
    linear = random_linear("qs8-qc8w", 64, 64, bias=False)
    record = msgspec.structs.replace(linear.record, input=grid, output=grid)
    identity = torch.eye(64, dtype=torch.int8)
    linear = dataclasses.replace(linear, record=record, codes=identity, scales=torch.ones(64, 1))
    ties = (torch.arange(-128, 128) + 0.5) * torch.tensor(scale)
    near = torch.cat([ties, ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9))]).view(-1, 64)
    assert len(near) <= MAX_TOKENS
    assert (quantize_static(near, grid) != ((near / torch.tensor(scale)).round() + 3).clamp(-128, 127)).any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [theirs] = compile_linears([linear])([near])
    assert torch.equal(integer_linear("xnnpack.static_per_channel", linear, near), theirs)
