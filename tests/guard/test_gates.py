"""Limits and gates: what passes, what fails, what is left open, and what is said."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import msgspec
import pytest

from afq_export.errors import InputError
from afq_export.guard.compare import Paired
from afq_export.guard.gates import Comparison, all_gates, drift_gate, percent, verdict
from afq_export.guard.limits import read_limits, share
from afq_export.spec.baseline import Facts, Machine, Speed
from afq_export.spec.guard import Gate, Limits
from afq_export.spec.report import Artifact
from tests.guard.sample import facts, protocol

STILL = Paired(0.0, 0.0, 6, 186)


def comparison(now: Facts | None = None, before: Facts | None = None, **changes: object) -> Comparison:
    """A bundle that is as it was, but for `changes`."""
    found = Comparison(STILL, STILL, 1.0, 0.0, 1.0, None, 0, before or facts(), now or facts())
    return dataclasses.replace(found, **changes)


def gates(found: Comparison, **limits: object) -> dict[str, Gate]:
    return {gate.name: gate for gate in all_gates(found, Limits(**limits), protocol())}


def changed(**changes: object) -> Facts:
    return msgspec.structs.replace(facts(), **changes)


def test_what_is_as_it_was_passes_everything() -> None:
    found = gates(comparison())
    assert list(found) == ["drift", "cumulative drift", "top-1", "KL", "size", "runtime options", "identical"]
    assert {gate.status for gate in found.values()} == {"passed"} and verdict(tuple(found.values())) == "pass"


def test_three_answers() -> None:
    """Five windows: 2.776 standard errors of 0.1 % each way, around half a per cent."""
    for mean, status in ((0.0, "passed"), (0.002, "passed"), (0.004, "inconclusive"), (0.007, "inconclusive"),
                         (0.009, "failed"), (-0.5, "passed")):  # fmt: skip
        drift = Paired(math.log1p(mean), 0.001 * math.sqrt(5), 5, 5 * 511)
        assert drift_gate("drift", drift, 0.005, protocol()).status == status, mean


def test_what_is_left_open_says_what_would_decide() -> None:
    drift = Paired(math.log1p(0.004), 0.002, 5, 5 * 511)
    few = drift_gate("drift", drift, 0.005, protocol(there=50)).detail
    windows = drift.windows_needed(0.005)
    assert windows == 34
    assert few == (
        "+0.400% ± 0.090%, limit +0.500%: "
        "not enough tokens (2555), need about 17374: a baseline of 34 windows (--windows)"
    )
    many = drift_gate("drift", drift, 0.005, protocol(there=20)).detail
    assert many.endswith("need about 17374: a text with 34 windows, this one has 20")
    never = drift_gate("drift", Paired(math.log1p(0.005), 0.002, 5, 2555), 0.005, protocol()).detail
    assert never.endswith("no number of them tells such a drift from its limit")


def test_a_sum_of_small_steps_is_seen() -> None:
    """Each update within its limit, all of them not."""
    found = gates(comparison(drift=Paired(0.001, 1e-4, 6, 186), cumulative=Paired(0.02, 1e-4, 6, 186)))
    assert (found["drift"].status, found["cumulative drift"].status) == ("passed", "failed")
    assert verdict(tuple(found.values())) == "fail"


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"top1": 0.9799}, "top-1", "the baseline's choice at 97.990% of tokens, floor 98.00%"),
        ({"kl": 1.1e-3}, "KL", "at least 1.10e-03 nats a token, limit 1.00e-03"),
        ({"kl": math.nan}, "KL", "at least nan nats a token, limit 1.00e-03"),
        ({"now": changed(artifact=Artifact(1021, "x", "model.onnx"))}, "size", "1021 bytes, were 1000: +2.10%"),
        ({"now": changed(settings={})}, "runtime options", "graph_optimization_level was all, is not set"),
        (
            {"now": changed(settings={"graph_optimization_level": "all", "a": "1"})},
            "runtime options",
            "a was not set, is 1",
        ),
        ({"broken": 2}, "drift", "2 of 186 losses are no finite number"),
    ],
)
def test_one_gate_fails(changes: dict[str, object], name: str, said: str) -> None:
    found = gates(comparison(**changes))
    assert {gate.name for gate in found.values() if gate.status == "failed"} >= {name}
    assert found[name].detail.startswith(said)


def test_identity() -> None:
    """Asked of another file on the same machine; of the same file always; never where another machine runs it."""
    other_file = changed(artifact=Artifact(1000, "x", "model.onnx"))
    other_cpu = changed(machine=Machine("x86_64", "another cpu", ("avx2", "avx512f"), 1))
    other_runtime = changed(versions={"onnxruntime": "1.32.0"})
    departs = {"identical": 0.5, "first_other": (1, 2)}
    said = "all logits equal at 50.000% of tokens, first other at window 1, token 3"

    assert "identical" not in gates(comparison(other_file, **departs))
    asked = gates(comparison(other_file, **departs), identical="same-machine")["identical"]
    assert (asked.status, asked.detail) == ("failed", said)
    unasked = gates(comparison(**departs))["identical"]
    assert (unasked.status, unasked.detail) == ("failed", f"{said}; the same file on the same machine")
    for now, why in ((other_cpu, "flags avx2 is avx2 avx512f"), (other_runtime, "onnxruntime 1.31.1 is 1.32.0")):
        assert "identical" not in gates(comparison(now, **departs))
        skipped = gates(comparison(now, **departs), identical="same-machine")["identical"]
        assert (skipped.status, skipped.detail) == ("skipped", f"{said}; not promised here: {why}")
        assert gates(comparison(now, **departs), identical="always")["identical"].status == "failed"
    assert gates(comparison(other_cpu), identical="same-machine")["identical"].status == "passed"


def test_speed() -> None:
    fast, slow = Speed(1000.0, 100.0), Speed(990.0, 85.0)
    assert "speed" not in gates(comparison())
    assert gates(comparison(), slowdown=0.1)["speed"].status == "skipped"
    found = gates(comparison(changed(speed=slow), changed(speed=fast)), slowdown=0.1)["speed"]
    assert (found.status, found.detail) == (
        "failed",
        "prefill 990 tokens/s, was 1000 (-1.00%), decode 85 tokens/s, was 100 (-15.00%), limit -10.00%",
    )
    assert gates(comparison(changed(speed=slow), changed(speed=fast)), slowdown=0.2)["speed"].status == "passed"
    emulated = gates(comparison(changed(speed=None), changed(speed=fast)), slowdown=0.2)["speed"]
    assert (emulated.status, emulated.detail) == ("skipped", "not measured: emulated, no speed claim")
    elsewhere = changed(speed=slow, machine=Machine("x86_64", "another cpu", ("avx2",), 1))
    skipped = gates(comparison(elsewhere, changed(speed=fast)), slowdown=0.2)["speed"]
    assert (skipped.status, skipped.detail) == ("skipped", "measured on some cpu, this is another cpu")


def test_verdicts() -> None:
    def of(*statuses: str) -> str:
        return verdict(tuple(Gate(str(n), status, "") for n, status in enumerate(statuses)))  # type: ignore[arg-type]

    assert of("passed", "skipped") == "pass"
    assert of("passed", "inconclusive") == "inconclusive"
    assert of("inconclusive", "failed") == "fail"


def test_limits_from_file_and_options(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text('drift = 0.01\nidentical = "always"\n')
    assert read_limits(None, {}) == Limits()
    assert read_limits(path, {"top1": "95%", "drift": "0.2%"}) == Limits(drift=0.002, top1=0.95, identical="always")
    assert share("inf", "--kl") == math.inf and share("0.005", "") == share("0.5%", "") == 0.005


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("drfit = 0.1", {}, "does not fit .*unknown field `drfit`; known keys here: drift, cumulative"),
        ("drift = -0.1", {}, "does not fit .*>= 0"),
        ("drift = nan", {}, "does not fit"),
        ("top1 = 98", {}, "does not fit .*<= 1"),
        ("", {"drift": "half"}, r"cannot read a limit \[--drift half\]; write 0.5%, 0.005 or inf"),
        ("", {"drift": "0.5%%"}, "cannot read a limit"),
        ("", {"kl": "nan"}, "cannot read a limit"),
        ("", {"top1": "98"}, r"does not fit \[--top1 98\].*<= 1"),
        ("", {"size": "-1%"}, "does not fit .*>= 0"),
        ("", {"identical": "maybe"}, r"does not fit \[--identical maybe\].*Invalid enum value 'maybe'"),
    ],
)
def test_limits_that_are_none(tmp_path: Path, text: str, options: dict[str, str], said: str) -> None:
    (tmp_path / "limits.toml").write_text(text)
    with pytest.raises(InputError, match=said):
        read_limits(tmp_path / "limits.toml", options)


def test_percent_shows_what_is_there() -> None:
    assert [percent(x) for x in (0, 0.024, -0.0031, 1e-5, 1.2e-7)] == [
        "+0.00%",
        "+2.40%",
        "-0.310%",
        "+0.001%",
        "+1.2e-05%",
    ]
    assert percent(0.5, "") == "50.00%"
