"""What `plan` says of memory comes near what is seen, and goes the right way with what is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from afq_export.estimate import memory as module
from afq_export.estimate.memory import memory
from afq_export.estimate.time import time
from afq_export.job import Job, resolve
from afq_export.machine import Speed, measured_speed, peak_rss_mb, resident_mb
from afq_export.plan import program_size
from afq_export.spec.request import Request

SMALL = Request(
    target="linux-x64-ort",
    recipe="w4a8-g32",
    changes=("samples.windows=8", "samples.length=64", "learning.epochs=2"),
    window=64,
    eval_windows=2,
    threads=1,
)


SPEED, SLOW = Speed(50.0, 100.0), Speed(0.5, 0.5)


def job(tmp_path: Path, *changes: str, **asked: object) -> Job:
    given = {"out": str(tmp_path / "run"), "changes": SMALL.changes + changes}
    return resolve(dataclasses.replace(SMALL, **(given | asked)))


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> float:
    """What the process has taken at most, and takes now."""
    monkeypatch.setattr(module, "peak_rss_mb", lambda: 400.0)
    monkeypatch.setattr(module, "resident_mb", lambda: 390.0)
    return 400.0


def test_activations_beyond_the_budget_are_not_in_memory(tmp_path: Path, process: float) -> None:
    here, there = (job(tmp_path, activation_memory_mb=budget) for budget in (1000, 0))
    kept, spilled = (memory(one, program_size(one)) for one in (here, there))
    needed = 6 * 8 * 64 * here.model.config.hidden * 4 / 1e6
    assert (kept.spilled, spilled.spilled) == (False, True)
    assert kept.activations == spilled.activations == round(needed)
    assert spilled.calibrate < kept.calibrate + needed and kept.process == process


def test_more_work_takes_more(tmp_path: Path, process: float) -> None:
    usual = job(tmp_path)
    for more in ("learning.epochs=8", "samples.windows=16", "rounding.method=learned"):
        other = job(tmp_path, more)
        assert time(other, SPEED, program_size(other)).calibrate > time(usual, SPEED, program_size(usual)).calibrate
    longer = job(tmp_path, "samples.length=128")
    assert memory(longer, program_size(longer)).calibrate > memory(usual, program_size(usual)).calibrate
    nearest = job(tmp_path, recipe="w4a8-g32+rtn", changes=SMALL.changes[:2])
    assert memory(nearest, program_size(nearest)).calibrate < memory(usual, program_size(usual)).calibrate
    assert (
        time(usual, Speed(100.0, 100.0), program_size(usual)).calibrate
        < time(usual, SPEED, program_size(usual)).calibrate
    )


def test_a_large_onnx_program_is_never_whole_in_memory(tmp_path: Path, process: float) -> None:
    small = job(tmp_path)
    options = msgspec.structs.replace(small.target.onnx, vectors_mb=0)
    streamed = dataclasses.replace(small, target=msgspec.structs.replace(small.target, onnx=options))
    sizes = [msgspec.structs.replace(program_size(small), linears=mb * 1_000_000) for mb in (500, 1000, 100_000)]
    whole = [memory(small, size).lower for size in sizes]
    assert whole[1] > whole[0] + 1000, "below the limit the runtime computes test vectors"
    few, many = (memory(streamed, size).lower for size in (sizes[0], sizes[2]))
    assert few == many < whole[0], "beyond it tensors go one by one, however many they are"


def test_dense_transforms_and_a_rotation_take_time(tmp_path: Path, process: float) -> None:
    """A learned matrix of the whole width is inverted and multiplied into weights, which takes memory too; a rotation
    turns weights and all token rows."""
    learned = ("transforms.norm_to_linears=affine", "learning.stability_factor=0.003")
    usual, dense = job(tmp_path), job(tmp_path, *learned, 'transforms.online=["norm_matrix"]')
    names = "rtn", "rotation"
    plain, turned = (job(tmp_path, recipe=f"w4a8-g32+{name}", changes=SMALL.changes[:2]) for name in names)
    size = program_size(usual)
    assert memory(dense, size).calibrate > memory(usual, size).calibrate
    for more, less in ((dense, usual), (turned, plain)):
        taken, without = time(more, SLOW, size), time(less, SLOW, size)
        assert taken.calibrate > without.calibrate and taken.quantize > without.quantize


def test_learning_end_to_end_has_hidden_states_once(tmp_path: Path, process: float) -> None:
    """The teacher's last hidden states stay in memory; what blocks are calibrated on has left it."""
    few, many = (job(tmp_path, f"end_to_end.windows={n}", "end_to_end.steps=1") for n in (64, 128))
    size, hidden = program_size(few), 64 * 64 * few.model.config.hidden * 4 / 1e6
    grown = memory(many, size).calibrate - memory(few, size).calibrate
    assert len(many.tuning.ids_NT) - len(few.tuning.ids_NT) == 64
    assert grown == pytest.approx(hidden, abs=2)


def test_every_stage_is_estimated(tmp_path: Path, process: float) -> None:
    """Nothing takes less than the process has taken already; a longer evaluation takes longer to validate."""
    usual, longer = job(tmp_path), job(tmp_path, eval_windows=4)
    estimated, size = memory(usual, program_size(usual)), program_size(usual)
    stages = ("calibrate", "quantize", "lower", "validate")
    assert all(getattr(estimated, stage) >= process for stage in stages)
    seconds = time(usual, SPEED, size)
    assert all(getattr(seconds, stage) >= 0 for stage in stages)
    assert time(longer, SPEED, size).validate >= seconds.validate


def test_bfloat16_is_as_fast_as_the_machine_says(tmp_path: Path, process: float) -> None:
    usual, halves = job(tmp_path), job(tmp_path, "learning.autocast=bfloat16")
    size = program_size(usual)
    slower, same, faster = (time(halves, Speed(0.01, half), size).calibrate for half in (0.005, 0.01, 0.05))
    assert faster < same < slower and same == time(usual, Speed(0.01, 1.0), size).calibrate


def test_speed_is_measured_in_both_precisions() -> None:
    speed = measured_speed(0.02)
    assert speed.float32 > 0.05 and speed.bfloat16 > 0.05


def test_resident_memory_is_what_the_system_says() -> None:
    assert 0 < resident_mb() <= peak_rss_mb() + 50
