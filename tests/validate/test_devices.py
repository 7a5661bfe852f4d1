"""What counts as the same on a device: planted differences are found, rounding and chance are not taken for them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from afq_export.device.names import DeviceRequest
from afq_export.device.program import Program
from afq_export.device.session import Kernels, LinearProgram, Ran
from afq_export.errors import InputError, VerdictError
from afq_export.report.markdown import report_markdown
from afq_export.report.tables import devices_table
from afq_export.runtime.onnxruntime import RunOptions
from afq_export.spec.report import Check, Perplexity, read_report, to_json
from afq_export.validate import devices
from afq_export.validate.device_linears import compare_linears, linears_check, record_linears
from afq_export.validate.device_logits import Comparison, chance_of, compare, judge, recut, refuse_other_losses
from afq_export.validate.devices import arithmetic_note, check_devices, few_windows
from afq_export.validate.ladder import NEEDED
from tests.checkpoints import random_checkpoint, random_windows, small_config, xnnpack_target
from tests.report.sample import sample
from tests.validate.test_layers import model_probe

TARGET = xnnpack_target(perplexity_budget=0.01, agreement_floor=0.99)
N, T, V = 3, 65, 11
FIGURE = Perplexity(value=20.0, stderr=0.5, tokens=254)
SAME = Comparison(1.0, 0.0, 1.0, FIGURE, FIGURE, 0.0)
"""A machine that is bit for bit equal to itself however it is called."""


@pytest.fixture
def ids_NT() -> torch.Tensor:
    return torch.randint(V, (N, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def logits_NTV() -> torch.Tensor:
    return torch.randn(N, T, V, generator=torch.Generator().manual_seed(1))


def test_equal_logits_are_equal(ids_NT: torch.Tensor, logits_NTV: torch.Tensor) -> None:
    found = compare(logits_NTV, logits_NTV.clone(), ids_NT)
    assert (found.bit_for_bit, found.max_relative_error, found.top1, found.excess) == (1.0, 0.0, 1.0, 0.0)
    assert found.here == found.there and found.here.tokens == N * (T - 1)
    assert judge("arm64:x", "neon", found, SAME, TARGET).status == "passed"


def test_one_bit_is_seen_and_passes(ids_NT: torch.Tensor, logits_NTV: torch.Tensor) -> None:
    other = logits_NTV.clone()
    other[1, 7, 3] = torch.nextafter(other[1, 7, 3], torch.tensor(math.inf))
    found = compare(logits_NTV, other, ids_NT)
    assert found.bit_for_bit == 1 - 1 / (N * (T - 1))
    assert found.max_relative_error == float((other - logits_NTV).abs().max()) / float(logits_NTV.abs().max())
    assert judge("arm64:x", "neon", found, SAME, TARGET).status == "passed"


def test_the_last_token_of_a_window_counts_for_the_largest_difference(
    ids_NT: torch.Tensor, logits_NTV: torch.Tensor
) -> None:
    other = logits_NTV.clone()
    other[-1, -1, 0] += 100.0
    assert compare(logits_NTV, other, ids_NT).max_relative_error > 10


def test_another_perplexity_fails_and_is_named(ids_NT: torch.Tensor, logits_NTV: torch.Tensor) -> None:
    """Twice the logits: the same choices at other probabilities."""
    check = judge("arm64:x", "dotprod", compare(logits_NTV, logits_NTV * 2, ids_NT), SAME, TARGET, "why")
    assert (check.name, check.status) == ("on arm64:x", "failed")
    assert check.detail.startswith("perplexity differs by +") and "same token at 100.00%" in check.detail
    assert check.detail.endswith("; why") and "other tokens" not in check.detail


def test_other_choices_fail_and_are_named(ids_NT: torch.Tensor, logits_NTV: torch.Tensor) -> None:
    """Two logits exchanged that are never asked for: the perplexity stays."""
    ids_NT, logits_NTV = ids_NT % (V - 2), logits_NTV.clone()
    logits_NTV[:, ::4, V - 1] = 9.0
    other = logits_NTV.clone()
    other[..., V - 2], other[..., V - 1] = logits_NTV[..., V - 1], logits_NTV[..., V - 2]
    found = compare(logits_NTV, other, ids_NT)
    assert abs(found.excess) < 1e-6 and found.top1 < 0.9
    check = judge("arm64:x", "dotprod", found, SAME, TARGET)
    assert check.status == "failed" and check.detail.startswith("other tokens are chosen at ")


@pytest.mark.parametrize("side", [0, 1])
def test_nan_never_passes(ids_NT: torch.Tensor, logits_NTV: torch.Tensor, side: int) -> None:
    both = [logits_NTV, logits_NTV.clone()]
    both[side][0, 0, 0] = math.nan
    assert judge("arm64:x", "neon", compare(*both, ids_NT), SAME, TARGET).status == "failed"


def test_chance_is_the_binomial_one() -> None:
    assert chance_of(0, 10, 0.1) == 1.0
    assert math.isclose(chance_of(1, 10, 0.1), 1 - 0.9**10)
    assert math.isclose(chance_of(10, 10, 0.5), 0.5**10, rel_tol=1e-9)
    assert math.isclose(chance_of(2, 3, 0.25), 3 * 0.25**2 * 0.75 + 0.25**3)
    assert chance_of(400, 6132, 0.005) == pytest.approx(0.0, abs=1e-12)  # no overflow
    assert [chance_of(events, 5, 0.0) for events in (0, 1)] == [1.0, 0.0]
    assert chance_of(5, 5, 1.0) == 1.0


def measured(other: int = 0, excess: float = 0.0, stderr: float = 0.0) -> Comparison:
    """254 tokens, `other` of them chosen otherwise, and a perplexity that is `excess` higher."""
    there = msgspec.structs.replace(FIGURE, value=FIGURE.value * (1 + excess))
    return Comparison(0.0, 1e-3, 1 - other / 254, FIGURE, there, stderr)


def test_few_tokens_do_not_break_a_floor_by_chance() -> None:
    """One token in 254 is below a floor of 99.7 %, and says nothing against it; ten do."""
    target = xnnpack_target(agreement_floor=0.997)
    for other, status in ((1, "passed"), (10, "failed")):
        assert judge("arm64:x", "neon", measured(other), SAME, target).status == status


def test_a_machine_that_departs_from_itself_allows_a_device_to() -> None:
    """Ten tokens of 254 are far from a floor of 99 %, and what float rounding does where the machine has five."""
    assert judge("arm64:x", "neon", measured(10), measured(0), TARGET).status == "failed"
    assert judge("arm64:x", "neon", measured(10), measured(5), TARGET).status == "passed"
    assert judge("arm64:x", "neon", measured(40), measured(5), TARGET).status == "failed"


def test_a_machine_that_does_not_agree_with_itself_does_not_let_everything_pass() -> None:
    """However often it chooses otherwise itself, a device may not do so at half of the tokens."""
    assert judge("arm64:x", "neon", measured(10), measured(200), TARGET).status == "passed"
    assert judge("arm64:x", "neon", measured(120), measured(200), TARGET).status == "failed"


def test_a_perplexity_counts_as_far_as_it_is_known() -> None:
    for excess, stderr, status in ((0.02, 0.01, "passed"), (0.02, 0.001, "failed"), (-0.02, 0.001, "failed")):
        assert judge("arm64:x", "neon", measured(0, excess, stderr), SAME, TARGET).status == status
    assert judge("arm64:x", "neon", measured(0, 0.0, math.nan), SAME, TARGET).status == "failed"


def test_the_error_of_a_perplexity_is_that_of_paired_tokens(ids_NT: torch.Tensor, logits_NTV: torch.Tensor) -> None:
    found = compare(logits_NTV, logits_NTV * 1.5, ids_NT)
    targets = ids_NT[:, 1:].flatten()
    losses = [
        torch.nn.functional.cross_entropy(one[:, :-1].reshape(-1, V).double(), targets, reduction="none")
        for one in (logits_NTV, logits_NTV * 1.5)
    ]
    difference = losses[1] - losses[0]
    assert found.excess_stderr == pytest.approx(float(difference.std()) / math.sqrt(len(difference)), rel=1e-6)
    assert math.log1p(found.excess) == pytest.approx(float(difference.mean()), rel=1e-6)


def test_windows_are_cut_anew_without_a_gap() -> None:
    calls = []

    def extend(ids: torch.Tensor, position: int) -> torch.Tensor:
        calls.append((position, len(ids)))
        return ids[:, None] * 2.0

    session = SimpleNamespace(logits=lambda ids: extend(ids, 0), extend=extend)
    ids = torch.arange(17)
    assert torch.equal(recut(session, ids), ids[:, None] * 2.0)
    assert calls == [(0, 7), (7, 7), (14, 3)]


def test_windows_are_spread_and_cut() -> None:
    ids = torch.arange(6)[:, None] * 100 + torch.arange(40)
    assert few_windows(ids, 2, 12).tolist() == [list(range(12)), list(range(500, 512))]
    assert few_windows(ids, 1, 12).shape == (1, 12)
    assert few_windows(ids, 9, 99).shape == (6, 40)
    with pytest.raises(InputError, match="too short"):
        few_windows(ids, 2, 9)


def linear_program(**bounds: float) -> LinearProgram:
    random = np.random.default_rng(0)
    outputs = {name: random.standard_normal((4, 5)).astype(np.float32) for name in bounds}
    return LinearProgram(b"", {name: np.zeros((4, 2), np.float32) for name in bounds}, outputs, bounds)


def changed(program: LinearProgram, name: str, relative: float) -> list[dict[str, np.ndarray]]:
    there = {key: value.copy() for key, value in program.outputs.items()}
    there[name][1, 1] += relative * np.abs(there[name]).max()
    return [there]


def test_linears_that_are_equal_rounded_or_wrong() -> None:
    program = linear_program(a=0.0, b=0.0, c=1e-2)
    same = compare_linears([program], [program.outputs])
    assert (same.count, same.exact, same.beyond, same.worst) == (3, 3, {}, None)
    assert linears_check("arm64:x", same, 4).detail == "3 of 3 linears equal this machine's bit for bit on 4 tokens"

    rounded = compare_linears([program], changed(program, "b", 3e-7))
    assert (rounded.exact, rounded.worst, rounded.beyond) == (2, "b", {})
    assert linears_check("arm64:x", rounded, 4).status == "passed"

    wrong = compare_linears([program], changed(program, "b", 1e-3))
    check = linears_check("arm64:x", wrong, 4)
    assert list(wrong.beyond) == ["b"] and check.status == "failed"
    assert check.detail.startswith("1 depart by more than rounding, first b; 2 of 3 linears equal")

    allowed = compare_linears([program], changed(program, "c", 1e-3))
    assert allowed.beyond == {} and allowed.worst == "c"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_linears_that_are_no_numbers_fail(value: float) -> None:
    program = linear_program(a=0.5)
    found = compare_linears([program], changed(program, "a", value))
    assert linears_check("arm64:x", found, 4).status == "failed"


def test_recorded_linears_are_all_and_in_the_order_of_their_program(tmp_path) -> None:
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(), "qd8-f32-qb4w")
    orders = []

    def probe(linears, inputs, keep):
        orders.append([linear.spec.name for linear in linears])
        keep(str(len(orders)).encode())
        return model_probe(linears, inputs)

    ids_T = random_windows(checkpoint.config).ids_NT[0]
    recorded = record_linears(checkpoint, xnnpack_target(), ids_T, probe)
    assert [list(program.inputs) for program in recorded] == orders
    assert [program.program for program in recorded] == [str(i + 1).encode() for i in range(len(orders))]
    assert sum(len(program.outputs) for program in recorded) == len(checkpoint.records)
    bounds = {name: bound for program in recorded for name, bound in program.bounds.items()}
    kernels = {name: record.kernel for name, record in checkpoint.records.items()}
    assert bounds == {name: xnnpack_target().kernel(kernel).max_relative_error for name, kernel in kernels.items()}
    assert all(len(x) == len(ids_T) for program in recorded for x in program.inputs.values())


@pytest.mark.parametrize(
    ("operators", "family", "level", "said"),
    [
        ({"MatMulNBits": 3}, "neon", "4", "computes in float32 there"),
        ({"MatMulNBits": 3}, "dotprod", "4", "another rule there than on x86"),
        ({"MatMulNBits": 3}, "i8mm", None, "another rule there than on x86"),
        ({"MatMulNBits": 3}, "dotprod", "0", ""),
        ({"MatMulInteger": 3}, "dotprod", "4", ""),
    ],
)
def test_known_differences_are_named(operators, family, level, said) -> None:
    kernels = Kernels(family, {}, operators)
    options = RunOptions({} if level is None else {devices.ACCURACY_LEVEL: level})
    model, facts = Program("onnxruntime", (), options), SimpleNamespace(abi="aarch64", cpu_features=())
    program = linear_program(a=0.0)
    departed = compare_linears([program], changed(program, "a", 1e-2))
    note = arithmetic_note(kernels, facts, model, departed)
    assert said in note and bool(said) == bool(note)
    assert arithmetic_note(kernels, facts, model, compare_linears([program], [program.outputs])) == ""
    assert arithmetic_note(kernels, SimpleNamespace(abi="x86_64", cpu_features=()), model, departed) == ""


def test_a_real_processor_says_itself_that_it_has_no_dot_product() -> None:
    departed = compare_linears([program := linear_program(a=0.0)], changed(program, "a", 1e-2))
    kernels, model = Kernels("unknown", {}, {"MatMulNBits": 1}), Program("onnxruntime", (), RunOptions({}))
    for features, said in (
        (("asimd",), "no dot product"),
        (("asimd", "asimddp"), "another rule"),
        ((), "another rule"),
    ):
        facts = SimpleNamespace(abi="aarch64", cpu_features=features)
        assert said in arithmetic_note(kernels, facts, model, departed)


@dataclasses.dataclass
class FakeSession:
    """A device that gives the host's logits, changed, or does not run."""

    device: SimpleNamespace
    program: Program
    folder = "/scratch/afq-0"
    facts = SimpleNamespace(abi="aarch64", cpu_features=(), processor="cortex-x, emulated")

    def linears(self, programs):
        return [program.outputs for program in programs]

    def run(self, ids_NT, prompt=None):
        if self.device.name == "arm64:broken":
            raise VerdictError("the exported file does not run", where=self.device.name, why="Illegal instruction")
        count, tokens = ids_NT.shape
        logits = self.device.logits[:count, :tokens] * self.device.factor
        losses = -logits[:, :-1].double().log_softmax(-1).gather(-1, ids_NT[:, 1:, None])[..., 0]
        return Ran(logits, losses, logits[:, :-1].argmax(-1), 0.1, (0.1,) * count, (0.0,) * count, 5.0, "1.5")

    def kernels(self, ids_T):
        return Kernels("dotprod", {"sdot": len(ids_T)}, {"MatMulNBits": 2, "Add": 5})


@pytest.mark.parametrize("what", ["nothing", "loss", "choice"])
def test_a_device_whose_losses_are_not_those_of_its_logits(ids_NT, logits_NTV, what: str) -> None:
    losses = -logits_NTV[:, :-1].double().log_softmax(-1).gather(-1, ids_NT[:, 1:, None])[..., 0]
    choices = logits_NTV[:, :-1].argmax(-1)
    if what == "loss":
        losses[1, 5] += 1e-5
    if what == "choice":
        choices[1, 5] = (choices[1, 5] + 1) % V
    ran = Ran(logits_NTV, losses, choices, 0.1, (), (), 5.0)
    if what == "nothing":
        assert refuse_other_losses("ssh:x", ran, ids_NT) is None
        return
    with pytest.raises(VerdictError, match=r"\[ssh:x\]: losses of vector 1 from token 5 are not those of its logits"):
        refuse_other_losses("ssh:x", ran, ids_NT)


def test_devices_in_the_report(monkeypatch, tmp_path, ids_NT, logits_NTV) -> None:
    @contextlib.contextmanager
    def opened(device, program, limits, **given):
        yield FakeSession(device, program)

    monkeypatch.setattr(devices, "open_session", opened)
    named = {"arm64:good": 1.0, "arm64:other": 2.0, "arm64:nan": math.nan, "arm64:broken": 1.0}
    given = [SimpleNamespace(name=n, factor=f, logits=logits_NTV, emulated=True) for n, f in named.items()]
    rows = {tuple(ids.tolist()): logits for ids, logits in zip(ids_NT, logits_NTV, strict=True)}

    def extend(ids: torch.Tensor, position: int) -> torch.Tensor:
        whole = next(row for row in rows if row[position : position + len(ids)] == tuple(ids.tolist()))
        return rows[whole][position : position + len(ids)]

    here = SimpleNamespace(vocab=V, context=T, prefill=8, logits=lambda ids: extend(ids, 0), extend=extend)
    program = linear_program(a=0.0)
    model = Program("executorch", (tmp_path / "model.pte",))
    found = check_devices(given, model, TARGET, here, ids_NT, [program], DeviceRequest(()))
    assert [(check.name, check.status) for check in found.checks] == [
        ("linears on arm64:good", "passed"),
        ("on arm64:good", "passed"),
        ("steps on arm64:good", "passed"),
        ("linears on arm64:other", "passed"),
        ("on arm64:other", "failed"),
        ("steps on arm64:other", "failed"),
        ("linears on arm64:nan", "passed"),
        ("on arm64:nan", "failed"),
        ("steps on arm64:nan", "failed"),
        ("on arm64:broken", "failed"),
    ]
    assert "Illegal instruction" in found.checks[-1].detail
    assert "vector 0 departs first, at token 0" in found.checks[4].detail
    assert found.reports[0].first_other is None and found.reports[1].first_other == (0, 0)
    assert [report.device for report in found.reports] == ["arm64:good", "arm64:other", "arm64:nan"]

    needed = tuple(Check(name=name, status="passed", detail="") for name in NEEDED)
    passing = sample(checks=needed)
    assert dataclasses.replace(found, checks=found.checks[:3]).added_to(passing).verdict == "pass"
    report = found.added_to(passing)
    assert report.verdict == "fail" and report.checks == needed + found.checks
    assert read_report(to_json(report).encode()) == report
    page = report_markdown(report)
    assert "## Devices" in page and "executorch 1.5 under an emulator of its own" in page
    assert "- arm64:good: executed 2 MatMulNBits\n- arm64:other: executed 2 MatMulNBits\n" in page
    assert report.devices[2].max_relative_error == report.devices[2].excess_stderr == 1e300
    assert [row[:4] for row in devices_table(report).rows] == [
        ("arm64:good", "dotprod", "sdot 9", "1 of 1"),
        ("arm64:other", "dotprod", "sdot 9", "1 of 1"),
        ("arm64:nan", "dotprod", "sdot 9", "1 of 1"),
    ]
    assert "## Devices" not in report_markdown(passing)
