"""The integer models against ONNX Runtime's real kernels, on random data and on data that is chosen to break them."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afq_export.errors import InputError
from afq_export.quantize.checkpoint import QuantizedLinear, StaticRange
from afq_export.spec.quant import Granularity, QuantSpec
from afq_export.validate.integer.linear import integer_linear
from afq_export.validate.integer.onnxruntime import quantize_by_division
from tests.checkpoints import hostile_weights
from tests.validate.onnx_programs import LEVEL_0, SESSION, Program, linear_of, with_grids

pytest.importorskip("onnxruntime", reason="the runtime is not installed")

EXACT = ("static_to_float", "static_requantized", "dynamic_per_token")
BLOCKED = ("dynamic_per_block", "weight_only")
BOUND = {"dynamic_per_block": 1e-4, "weight_only": 1e-5}
"""|runtime - model| over the largest |output|. The runtime adds float32 numbers in an order of its own; at level 4 it
computes the part of the activations' sum that comes from the weights' zero point apart, and the two may cancel."""


def modelled(linear: QuantizedLinear, x: Tensor) -> Tensor:
    return integer_linear(f"onnxruntime.{linear.record.kernel}", linear, x)


def session_of(linear: QuantizedLinear) -> dict[str, str]:
    return LEVEL_0 if linear.record.kernel == "weight_only" else SESSION


def assert_same(linear: QuantizedLinear, x: Tensor, theirs: Tensor, where: str = "") -> None:
    """Bit for bit where the arithmetic is one chain of roundings, else within the bound."""
    ours, where = modelled(linear, x), f"{linear.record.kernel} {tuple(linear.codes.shape)} {where}"
    assert torch.isfinite(theirs).all(), where
    if linear.record.kernel in BLOCKED:
        assert (ours - theirs).abs().max() <= BOUND[linear.record.kernel] * theirs.abs().max(), where
    else:
        different = (ours != theirs).nonzero()
        assert not len(different), f"{where}: {len(different)} of {ours.numel()} differ, first {different[0].tolist()}"


def hostile_inputs(inputs: int, rows: int = 40) -> Tensor:
    """Rows of very different sizes, constant, one-sided, empty, with outliers, on halves of a grid: [T, I]."""
    random = torch.Generator().manual_seed(inputs)
    noise = torch.randn(rows, inputs, generator=random)
    outlier, unit = noise[0].clone(), torch.linspace(-127, 127, inputs)
    outlier[inputs // 2] = 1e4
    chosen = [
        torch.zeros(inputs),
        torch.ones(inputs),
        torch.full((inputs,), -3.7e-3),
        noise[1].abs(),
        -noise[2].abs() - 100,
        outlier,
        -outlier,
        unit,
        (unit.round() + 0.5).clamp(-127, 127),
        (unit.round() + 0.5).clamp(-127, 127).flip(0) * 2**-9,
        torch.where(torch.arange(inputs) % 2 == 0, 1.0, -1.0),
        noise[4] * 1e-30,
        noise[5] * 1e-42,
        noise[6] * 1e28,
        (noise[7] * 8).round() / 8,
        noise[8] ** 5,
    ]
    sizes = 10.0 ** torch.linspace(-3, 3, rows - len(chosen))[:, None]
    return torch.cat([torch.stack(chosen), noise[len(chosen) :] * sizes])


def assert_the_kernel(linears, program, tokens):
    """The program against the integer model, `tokens` rows of hostile inputs at a time."""
    inputs = [hostile_inputs(linear.spec.inputs) for linear in linears]
    for start in range(0, 40, tokens):
        part = [x[start : start + tokens] for x in inputs]
        for linear, x, theirs in zip(linears, part, program.run(part), strict=True):
            assert_same(linear, x, theirs, f"rows {start}..")


def in_one_model(kernel, bits, **more):
    """Six linears (three shapes, with and without bias where the kernel takes one) in one model."""
    linears = [
        hostile_weights(linear_of(kernel, *shape, bias=bias, bits=b, name=f"blocks.{n}.{bias}", seed=n, **more))
        for n, (shape, b) in enumerate(zip([(48, 64), (33, 33), (17, 1536)], bits, strict=True))
        for bias in (True, False)
    ]
    return linears, Program(linears)


@pytest.fixture(scope="module", params=EXACT)
def together(request):
    return in_one_model(request.param, (8, 4, 8))


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_model_is_the_kernel(together, tokens):
    assert_the_kernel(*together, tokens)


@pytest.fixture(scope="module")
def narrow():
    """The same for inputs of 4 bits."""
    return in_one_model("dynamic_per_token", (4, 8, 4), input_bits=4)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_model_is_the_kernel_on_inputs_of_4_bits(narrow, tokens):
    assert_the_kernel(*narrow, tokens)


def test_inputs_of_4_bits_have_fifteen_values():
    linear = linear_of("dynamic_per_token", 512, 512, input_bits=4, bias=False)
    linear = dataclasses.replace(linear, codes=torch.eye(512, dtype=torch.int8), scales=torch.ones(512, 1))
    x = torch.linspace(-1, 1, 512) * 10.0 ** torch.arange(-3, 3)[:, None]
    [theirs] = Program([linear]).run([x])
    assert [len(row.unique()) for row in theirs] == [15] * 6
    step = x.abs().amax(-1, keepdim=True) / 7
    assert torch.equal(theirs, (x / step).round() * step)
    assert torch.equal(theirs, modelled(linear, x))


@pytest.mark.parametrize("inputs", [64, 256, 257, 1536])
def test_a_scale_per_row_is_the_same_scale_for_every_block(inputs):
    """How weight-only rows reach MatMulNBits: the file repeats a row's scale, the model knows one."""
    blocked = linear_of("weight_only", 24, inputs, bits=4, group=256)
    blocked = dataclasses.replace(blocked, scales=blocked.scales[:, :1].expand(-1, blocked.spec.groups).contiguous())
    weight = QuantSpec(4, Granularity.PER_CHANNEL)
    record = msgspec.structs.replace(blocked.record, spec=msgspec.structs.replace(blocked.spec, weight=weight))
    row = dataclasses.replace(blocked, record=record, scales=blocked.scales[:, :1])
    x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0))
    [theirs] = Program([blocked], stored=4).run([x], LEVEL_0)
    assert_same(row, x, theirs)
    assert torch.equal(modelled(row, x), modelled(blocked, x))


@pytest.mark.parametrize("arithmetic", EXACT)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 64),
    inputs=st.one_of(st.integers(1, 70), st.integers(1000, 4096)),
    outputs=st.integers(1, 300),
    bits=st.sampled_from([8, 4, 3]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_model_is_the_kernel_in_any_shape(arithmetic, tokens, inputs, outputs, bits, bias, seed):
    linear = linear_of(arithmetic, outputs, inputs, bits=bits, bias=bias, seed=seed)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed))
    [theirs] = Program([linear]).run([x])
    assert_same(linear, x, theirs)


@pytest.mark.parametrize("arithmetic", EXACT)
def test_batches_are_rows(arithmetic):
    linear, x = linear_of(arithmetic), torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    [theirs] = Program([linear]).run([x])
    assert torch.equal(modelled(linear, x), theirs)


def test_inputs_at_ties_are_divided_and_rounded_to_even():
    """On a scale that is no power of two, values next to the ties: a product with the reciprocal gives other codes."""
    grid = StaticRange(scale=1 / 3, zero_point=3)
    linear = with_grids(linear_of("static_to_float", 64, 64, bias=False), input=grid)
    linear = dataclasses.replace(linear, codes=torch.eye(64, dtype=torch.int8), scales=torch.ones(64, 1))
    ties = (torch.arange(-256, 256) + 0.5) * torch.tensor(1 / 3)
    near = torch.cat([ties, ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9))]).view(-1, 64)
    [theirs] = Program([linear]).run([near])
    assert torch.equal(modelled(linear, near), theirs)
    reciprocal = ((near * torch.tensor(1 / 3).reciprocal()).round() + 3).clamp(-128, 127)
    assert not torch.equal(quantize_by_division(near, grid), reciprocal)


def test_requantization_ties_go_to_even():
    """Accumulators that fall exactly between two output codes."""
    grids = {"input": StaticRange(scale=0.125, zero_point=3), "output": StaticRange(scale=0.5, zero_point=-1)}
    linear = with_grids(linear_of("static_requantized", 16, 32, bits=4), **grids)
    linear = dataclasses.replace(linear, scales=torch.full((16, 1), 0.125))
    x = (torch.arange(64 * 32).view(64, 32) % 251 - 125) / 16
    steps = (quantize_by_division(x, grids["input"]) - 3) @ linear.codes.float().t() / 32
    inside = (steps.abs() < 126) & (steps % 1 == 0.5)
    assert inside.float().mean() > 0.005 and (steps[inside].round() != (steps[inside] + 0.5).floor()).any()
    [theirs] = Program([linear]).run([x])
    assert torch.equal(modelled(linear, x), theirs)


def test_requantization_multiplies_by_one_rounded_quotient():
    """fl(fl(sx * ws) / sy): another order of the same three numbers differs by one bit, which shows next to ties.

    Row n has an accumulator whose product in column n is a half within float32's precision.
    """
    random = torch.Generator().manual_seed(0)
    grids = {"input": StaticRange(scale=0.0123, zero_point=0), "output": StaticRange(scale=2.71, zero_point=0)}
    source, target = (torch.tensor(grids[side].scale) for side in ("input", "output"))
    steps_TI = torch.randint(1, 128, (300, 2), generator=random).float()
    sums_T = steps_TI @ torch.tensor([127.0, 1.0])
    halves_T = torch.randint(0, 126, (300,), generator=random) + 0.5
    linear = with_grids(linear_of("static_requantized", 300, 2), **grids)
    codes_OI = torch.tensor([[127, 1]], dtype=torch.int8).repeat(300, 1)
    scales_O = halves_T / sums_T * target / source
    linear = dataclasses.replace(linear, codes=codes_OI, scales=scales_O[:, None])
    x, ours = steps_TI * source, modelled(linear, steps_TI * source)
    [theirs] = Program([linear]).run([x])
    assert torch.equal(ours, theirs)
    for other_O in (scales_O * (source / target), source * (scales_O / target)):
        otherwise = (sums_T[:, None] * other_O).round().clamp(-128, 127) * target
        assert (otherwise != ours).diagonal().sum() > 10


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_block_codes_are_products_with_one_rounded_quotient(bits):
    """x * fl(127 / amax), not x / fl(amax / 127): next to the halves between codes they differ, by a whole code."""
    random = torch.Generator().manual_seed(0)
    linear = linear_of("dynamic_per_block", 32, 32, bits=bits, bias=False)
    linear = dataclasses.replace(linear, codes=torch.eye(32, dtype=torch.int8), scales=torch.ones(32, 1))
    largest = 1 + torch.rand(500, 1, generator=random)
    x = (torch.randint(-127, 127, (500, 32), generator=random) + 0.5) / 127 * largest
    x[:, :1] = largest
    step = largest / 127
    [theirs] = Program([linear]).run([x])
    assert ((modelled(linear, x) - theirs).abs() < 0.05 * step).all()
    assert (((x / step).round() * step - theirs).abs() > 0.95 * step).float().mean() > 0.1


def test_token_codes_at_ties_go_to_even():
    """Steps that are powers of two, values on the halves between codes."""
    linear = linear_of("dynamic_per_token", 64, 64, bias=False)
    linear = dataclasses.replace(linear, codes=torch.eye(64, dtype=torch.int8), scales=torch.ones(64, 1))
    x = (torch.arange(64 * 8).view(8, 64) % 253 - 126) + 0.5
    x[:, 0] = 127
    x = x * 2.0 ** torch.arange(-20, 20, 5)[:, None]
    [theirs] = Program([linear]).run([x])
    assert torch.equal(modelled(linear, x), theirs)
    assert torch.equal(theirs, x.sign() * (x.abs() / theirs[:, :1] * 127).round() * theirs[:, :1] / 127)


@pytest.mark.parametrize("arithmetic", BLOCKED)
@pytest.mark.parametrize(
    "bits, stored, group, outputs, inputs",
    [
        (8, 8, 32, 33, 172),
        (8, 8, 128, 7, 2048),
        (4, 4, 16, 53, 100),
        (4, 4, 32, 33, 172),
        (4, 4, 128, 20, 1536),
        (3, 4, 64, 21, 333),
        (2, 2, 32, 52, 172),
        (2, 2, 128, 24, 384),
    ],
)
def test_blocks_are_the_model_within_the_bound(arithmetic, bits, stored, group, outputs, inputs):
    for bias in (True, False):
        linear = linear_of(arithmetic, outputs, inputs, bits=bits, group=group, bias=bias, seed=group)
        x = hostile_inputs(inputs)
        program = Program([linear], stored=stored)
        for row in range(0, 40, 8):  # one row alone: the sizes of rows differ, and the bound is on the largest output
            [theirs] = program.run([x[row : row + 1]], session_of(linear))
            assert_same(linear, x[row : row + 1], theirs, f"row {row}")
        [theirs] = program.run([x[16:]], session_of(linear))
        assert_same(linear, x[16:], theirs)


@pytest.mark.parametrize("bits, group", [(8, 32), (4, 32), (2, 32), (4, 128)])
def test_inputs_of_one_sign_stay_within_the_bound(bits, group):
    """As behind a ReLU: the case in which most cancels. Gaussian weights, whose outputs are small beside their sums."""
    random = torch.Generator().manual_seed(bits + group)
    linear = linear_of("dynamic_per_block", 128, 4096, bits=bits, group=group, bias=False)
    grid, weight = linear.spec.weight, torch.randn(128, 4096 // group, group, generator=random)
    scales = weight.abs().amax(-1) / grid.qmax
    codes = (weight / scales[..., None]).round().clamp(grid.qmin, grid.qmax).flatten(1).to(torch.int8)
    linear = dataclasses.replace(linear, codes=codes, scales=scales)
    x = torch.randn(16, 4096, generator=random).abs() + 1
    [theirs] = Program([linear]).run([x])
    assert_same(linear, x, theirs)


@pytest.mark.parametrize("arithmetic", BLOCKED)
@pytest.mark.parametrize("bits", [4, 2])
def test_zero_points_of_zero_change_nothing(arithmetic, bits):
    linear, x = linear_of(arithmetic, 24, 172, bits=bits), hostile_inputs(172)[16:]
    [with_them] = Program([linear], zero_points=True).run([x], session_of(linear))
    [without] = Program([linear], zero_points=False).run([x], session_of(linear))
    assert torch.equal(with_them, without)


@pytest.mark.parametrize("group", [16, 256])
def test_two_bits_at_level_4_are_integer_in_some_groups_only(group):
    """Why the targets have 32, 64 and 128: beside them the runtime takes a float kernel of the same name."""
    linear = linear_of("dynamic_per_block", 24, 512, bits=2, group=group)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    [theirs] = Program([linear]).run([x])
    assert (modelled(linear, x) - theirs).abs().max() > 1e-3 * theirs.abs().max()
    floating = integer_linear("onnxruntime.weight_only", linear, x)
    assert (floating - theirs).abs().max() < BOUND["weight_only"] * theirs.abs().max()


OPERATORS = {
    "static_to_float": "MatMulIntegerToFloat",
    "static_requantized": "QLinearMatMul",
    "dynamic_per_token": "MatMulInteger",
    "dynamic_per_block": "MatMulNBits",
    "weight_only": "MatMulNBits",
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("arithmetic", OPERATORS)
def test_the_profile_names_each_linear(tmp_path, arithmetic, shared):
    """Under the linear's own name stands the integer kernel, also where q, k and v share their input."""
    names = [f"blocks.0.{role}_proj" for role in "qkv"]
    linears = [linear_of(arithmetic, 24, 64, name=n, bias=False, seed=i) for i, n in enumerate(names)]
    program, x = Program(linears, shared=shared), torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    inputs = [x] if shared else [x] * 3
    ran = program.operators(inputs, tmp_path)
    assert [ran[name] for name in names] == [OPERATORS[arithmetic]] * 3
    assert "MatMul" not in ran.values()
    quantizers = [operator for operator in ran.values() if operator in ("QuantizeLinear", "Round")]
    if arithmetic in ("static_to_float", "dynamic_per_token"):
        assert len(quantizers) == 1 if shared else 3
    outputs = program.run(inputs, session_of(linears[0]))
    for linear, theirs in zip(linears, outputs, strict=True):
        assert_same(linear, x, theirs)


def test_a_bias_takes_the_output_grid_out_of_the_kernel(tmp_path):
    """Why QLinearMatMul takes no bias: with one the sum is rounded in float, and the model is another."""
    linear = dataclasses.replace(linear_of("static_requantized"), bias=torch.ones(24))
    with pytest.raises(InputError, match="no bias"):
        modelled(linear, torch.ones(1, 64))
    ran = Program([linear]).operators([torch.ones(1, 64)], tmp_path)
    assert ran["blocks.0.q_proj"] == "MatMulIntegerToFloat"
    assert list(ran.values())[-2:] == ["QuantizeLinear", "DequantizeLinear"]


def test_without_the_optimizer_the_profile_shows_float(tmp_path):
    ran = Program([linear_of("static_to_float")]).operators(
        [torch.ones(1, 64)], tmp_path, SESSION | {"graph_optimization_level": "basic"}
    )
    assert ran["blocks.0.q_proj"] == "MatMul"
