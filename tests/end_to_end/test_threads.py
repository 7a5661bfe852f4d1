"""One thread or two: the same integers. Only what is added over a whole tensor (a recorded loss) may differ in its last
bits, because the two halves are added apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from afq_export.cli import call
from afq_export.quantize.checkpoint import QuantizedCheckpoint, open_checkpoint

SMALL = ("--set", "samples.windows=8", "--set", "samples.length=128")
"""Enough tokens that torch divides its work: from 32768 numbers on."""
LOSS = 1e-5
"""By which recorded losses may differ, relatively; 1e-7 was seen."""
SHARE, SCALE = 1e-3, 1e-3
"""What a choice between two all but equal losses may change where something is learned: the share of codes (by one
step), and scales relatively. Nothing was seen."""
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """What torch had before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quantized(folder: Path, recipe: str, threads: int, *more: str) -> Path:
    given = ["--target", "android-xnnpack", "--recipe", recipe, "--threads", str(threads), "--out", str(folder)]
    assert call(["quantize", "--model", "demo-llama", *given, *SMALL, *more]) == 0
    return folder


def numbers(value: object) -> Iterator[float]:
    """All numbers of a nested value, in order."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from numbers(item)
    if isinstance(value, int | float):
        yield float(value)


def same_calibration(one: Path, two: Path) -> bool:
    """Whether all tensors of two calibration files are equal to the bit. Asserts that what was recorded is close."""
    first, second = safe_open(one, "pt"), safe_open(two, "pt")
    recorded = [list(numbers(json.loads(file.metadata()["afq"]))) for file in (first, second)]
    assert recorded[0] == pytest.approx(recorded[1], rel=LOSS)
    assert list(first.keys()) == list(second.keys())
    return all(torch.equal(first.get_tensor(key), second.get_tensor(key)) for key in first.keys())


def far(one: QuantizedCheckpoint, two: QuantizedCheckpoint) -> tuple[float, int, float]:
    """Share of codes that differ, the most steps by which one does, and the largest relative difference of scales."""
    differ, total, steps, scale = 0, 0, 0, 0.0
    for name in one.records:
        a, b = one.linear(name), two.linear(name)
        apart = (a.codes.int() - b.codes.int()).abs()
        differ, total, steps = differ + int((apart > 0).sum()), total + apart.numel(), max(steps, int(apart.max()))
        scale = max(scale, float(((a.scales.double() - b.scales.double()) / a.scales.double()).abs().max()))
    return differ / total, steps, scale


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("w4a8-g32+awq", ()),
        pytest.param("w8a8-dynamic+gptq", (), marks=SLOW),
        pytest.param("w8a8-dynamic+affinequant", ("--set", "learning.epochs=2"), marks=SLOW),
        pytest.param("w4a8-g32+signround", ("--set", "rounding.steps=20"), marks=SLOW),
    ],
)
def test_one_or_two(tmp_path: Path, recipe: str, more: tuple[str, ...]) -> None:
    one, two = (quantized(tmp_path / str(count), recipe, count, *more) for count in (1, 2))
    files = sorted(path.name for path in (one / "calibration").glob("*.safetensors"))
    same = [same_calibration(one / "calibration" / name, two / "calibration" / name) for name in files]
    if "awq" in recipe or "gptq" in recipe:
        assert files and all(same)
        for path in (one / "quantized").iterdir():
            assert path.read_bytes() == (two / "quantized" / path.name).read_bytes(), path.name
        return
    share, steps, scale = far(*(open_checkpoint(folder / "quantized") for folder in (one, two)))
    assert share <= SHARE and steps <= 1 and scale <= SCALE
