"""The integer models against OpenVINO's real kernels, on random data and on data that is chosen to break them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afq_export.errors import InputError
from afq_export.quantize.activations import quantize_groups
from afq_export.quantize.checkpoint import QuantizedLinear
from afq_export.spec.catalog import load_target
from afq_export.spec.target import Kernel
from afq_export.validate.integer.linear import integer_linear
from afq_export.validate.integer.openvino import blocks_of

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from tests.checkpoints import hostile_weights
from tests.validate.openvino_programs import DYNAMIC, FLOAT, Program, linear_of, run

EXACT, FREE = "dynamic_per_group", "weight_only"
BOUND = 1e-5
"""|runtime - model| over the largest |output| of weight_only, whose float32 sums have an order of their own."""


def modelled(linear: QuantizedLinear, x: Tensor) -> Tensor:
    return integer_linear(f"openvino.{linear.record.kernel}", linear, x)


def assert_same(linear: QuantizedLinear, x: Tensor, theirs: Tensor | None = None) -> None:
    """Bit for bit; `theirs` from a program of its own unless it is given."""
    theirs = run(linear, x, DYNAMIC) if theirs is None else theirs
    different = (modelled(linear, x) != theirs).nonzero()
    where = f"{tuple(linear.codes.shape)} {linear.spec.weight}"
    assert not len(different), f"{where}: {len(different)} of {theirs.numel()} differ, first {different[0]}"


def hostile_inputs(inputs: int, rows: int = 40) -> Tensor:
    """Rows of very different sizes, constant, one-sided, empty, with outliers, on halves of a grid: [T, I]."""
    noise = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(inputs))
    outlier, unit = noise[0].clone(), torch.linspace(-127, 127, inputs)
    outlier[inputs // 2] = 1e4
    gap = noise[3].clone()
    gap[:32] = 0
    chosen = [
        torch.zeros(inputs),
        torch.ones(inputs),
        torch.full((inputs,), -3.7e-3),
        noise[1].abs(),
        -noise[2].abs() - 100,
        gap,
        outlier,
        (unit.round() + 0.5).clamp(-127, 127),
        (unit.round() + 0.5).clamp(-127, 127).flip(0) * 2**-9,
        noise[4] * 1e-30,
        noise[6] * 1e28,
        (noise[7] * 8).round() / 8,
        noise[8] ** 5,
    ]
    sizes = 10.0 ** torch.linspace(-3, 3, rows - len(chosen))[:, None]
    return torch.cat([torch.stack(chosen), noise[len(chosen) :] * sizes])


SHAPES = [(48, 64, 8, 0), (33, 172, 4, 0), (17, 96, 4, 32), (20, 1536, 8, 0), (9, 1088, 4, 64), (24, 256, 8, 128)]


def test_the_model_is_the_kernel() -> None:
    """On chosen rows, alone and together: a call with one token takes another kernel than one with several."""
    linears = [
        hostile_weights(linear_of(EXACT, outputs, inputs, bits=bits, group=group, bias=bias, seed=inputs))
        for outputs, inputs, bits, group in SHAPES
        for bias in (True, False)
    ]
    inputs, program = [hostile_inputs(linear.spec.inputs) for linear in linears], Program(linears, DYNAMIC)
    for part in (slice(0, 40), slice(0, 7), *(slice(row, row + 1) for row in range(0, 40, 3))):
        rows = [x[part] for x in inputs]
        for linear, x, theirs in zip(linears, rows, program(rows), strict=True):
            assert_same(linear, x, theirs)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 70),
    inputs=st.one_of(st.integers(16, 128), st.integers(500, 2048)).map(lambda half: 2 * half),
    outputs=st.integers(2, 100),
    bits=st.sampled_from([8, 4, 3]),
    group=st.sampled_from([0, 32, 64, 128]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_model_is_the_kernel_in_any_shape(
    tokens: int, inputs: int, outputs: int, bits: int, group: int, bias: bool, seed: int
) -> None:
    inputs -= inputs % (group or 2)
    linear = linear_of(EXACT, outputs, max(inputs, group), bits=bits, group=group, bias=bias, seed=seed)
    assert_same(linear, torch.randn(tokens, linear.spec.inputs, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(
    ("inputs", "group", "expected"),
    [
        (64, 32, 1024),
        (1024, 32, 1024),
        (1088, 32, 544),
        (1088, 64, 1024),
        (1152, 128, 2048),
        (1360, 32, 512),
        (2080, 32, 416),
        (2144, 32, 1024),
        (17152, 32, 256),
    ],
)
def test_sums_start_anew_where_the_kernel_starts_a_block(inputs: int, group: int, expected: int) -> None:
    """Each of these was found on the kernel by trying all blocks, and each is tried again here."""
    assert blocks_of(inputs, group) == expected
    linear = linear_of(EXACT, 32, inputs, group=group if group > 32 else 0, bias=False)
    assert_same(linear, torch.randn(2, inputs, generator=torch.Generator().manual_seed(inputs)))


def test_codes_are_products_with_the_reciprocal_of_the_step() -> None:
    """x * fl(1 / fl(amax / 127)): next to the halves between codes, x * fl(127 / amax) gives others."""
    linear = linear_of(EXACT, 32, 32, bits=8, bias=False)
    linear = dataclasses.replace(linear, codes=torch.eye(32, dtype=torch.int8), scales=torch.ones(32, 1))
    random = torch.Generator().manual_seed(0)
    largest = 1 + torch.rand(500, 1, generator=random)
    x = (torch.randint(-127, 127, (500, 32), generator=random) + 0.5) / 127 * largest
    x[:, :1] = largest
    assert_same(linear, x)
    by_quotient = quantize_groups(x, linear.spec.activation).dequantized()
    assert (by_quotient != modelled(linear, x)).float().mean() > 0.01


@pytest.mark.parametrize(("inputs", "away"), [(64, False), (84, True), (172, True)])
def test_halves_in_a_short_last_group_go_away_from_zero(inputs: int, away: bool) -> None:
    """The kernel leaves that group to scalar code, which rounds otherwise than its vectors."""
    linear = linear_of(EXACT, inputs, inputs, bits=8, bias=False)
    linear = dataclasses.replace(linear, codes=torch.eye(inputs, dtype=torch.int8), scales=torch.ones(inputs, 1))
    x = ((torch.arange(inputs) % 120 + 0.5) * torch.tensor([1, -1]).repeat(inputs // 2))[None]
    x[:, ::32] = 127
    x = torch.cat([x, -x])
    assert_same(linear, x)
    assert bool(((x - modelled(linear, x)).abs() == 0.5).any()), "there are halves"
    whole = inputs // 32 * 32
    even = modelled(linear, x)[:, whole:] == x[:, whole:].round()
    assert bool((~even).any()) == away


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "group"), [(172, 0), (1536, 0), (64, 16), (256, 128), (30, 0)])
def test_float_inputs_meet_the_weights_themselves(bits: int, inputs: int, group: int) -> None:
    linear = linear_of(FREE, 33, inputs, bits=bits, group=group)
    for tokens in (1, 40):
        x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens))
        theirs = run(linear, x, FLOAT)
        assert (modelled(linear, x) - theirs).abs().max() <= BOUND * theirs.abs().max()


@pytest.mark.parametrize(("inputs", "group"), [(64, 16), (30, 0)])
def test_small_groups_and_short_rows_keep_float_inputs(inputs: int, group: int) -> None:
    """The trap: the property asks for quantized activations, and nothing says that they are not."""
    linear = linear_of(FREE, 24, inputs, group=group)
    x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0))
    theirs = run(linear, x, DYNAMIC)
    assert (modelled(linear, x) - theirs).abs().max() <= BOUND * theirs.abs().max()


def test_int4_rows_of_an_odd_width_are_wrong() -> None:
    """The trap: right for a single token, wrong for several."""
    linear = linear_of(FREE, 24, 33)
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(0))
    theirs = run(linear, x, FLOAT)
    assert (modelled(linear, x) - theirs).abs().max() > 0.05 * theirs.abs().max()


def test_unasked_the_plugin_rounds_and_quantizes() -> None:
    """The trap: with no property set, inputs are quantized, and on CPUs that have it the product is in bfloat16."""
    linear = linear_of(FREE, 24, 64, bits=8)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    theirs = run(linear, x, {})
    assert (modelled(linear, x) - theirs).abs().max() > 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("kernel", load_target("intel-openvino").kernels, ids=lambda kernel: kernel.name)
def test_kernels_of_the_target_compute_as_it_says(kernel: Kernel) -> None:
    """Each with the fewest and the most bits, and with every group that it takes."""
    arithmetic = kernel.arithmetic.removeprefix("openvino.")
    for bits in (kernel.weight_bits[0], kernel.weight_bits[-1]):
        for group in kernel.groups or (0,):
            linear = linear_of(arithmetic, 40, 256, bits=bits, group=group, seed=bits)
            x = torch.randn(6, 256, generator=torch.Generator().manual_seed(group))
            theirs, ours = run(linear, x, kernel.session | {"INFERENCE_PRECISION_HINT": "f32"}), modelled(linear, x)
            assert (ours - theirs).abs().max() <= kernel.max_relative_error * ours.abs().max()
            assert arithmetic == FREE or torch.equal(ours, theirs)


def test_a_linear_without_activation_groups_is_refused() -> None:
    with pytest.raises(InputError, match="no dynamic activation groups"):
        integer_linear("openvino.dynamic_per_group", linear_of(FREE), torch.zeros(1, 64))
