"""Shards: every process has its part, and the bytes do not depend on how many processes there are."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from afq_export.calibrate.calibrate import calibrate
from afq_export.calibrate.result import Calibration, block_path
from afq_export.calibrate.shards import ALONE, Shards, connected, open_shards
from afq_export.errors import InputError
from afq_export.load.corpus import Windows
from afq_export.load.model import open_model
from afq_export.machine import settle
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import load_recipe, load_target
from tests.models import write_model

RATES = ("learning.learning_rate=2e-3", "learning.clipping_rate=5e-3", "learning.held_out=0")
CHANGES = (*RATES, "learning.epochs=2", "learning.batch=4", "rounding.method=learned", "rounding.steps=4")


def run(model: str, folder: Path, shards: Shards) -> Calibration:
    settle(1)
    opened, recipe = open_model(model), load_recipe("w4a8-g32+affinequant", CHANGES)
    ids = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(5))
    windows = Windows(ids, "random", "-", 24, 8, "-", 24)
    records = assign(opened.config, recipe, load_target("android-xnnpack"))
    with connected(shards):
        return calibrate(opened, recipe, records, windows, folder, 0, silent, shards=shards)


def process(rank: int, world: int, port: int, model: str, folder: Path) -> None:
    """What torchrun would start."""
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank}
    os.environ.update({key: str(value) for key, value in here.items()})
    run(model, folder, open_shards())


def test_two_processes_end_in_the_bytes_of_one(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "model", "llama"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (2, port, model, tmp_path / "two"), nprocs=2)
    one, plain = (run(model, tmp_path / name, shards) for name, shards in (("one", Shards(2)), ("plain", ALONE)))
    for index in range(one.layers):
        first, second = (block_path(tmp_path / name, index).read_bytes() for name in ("one", "two"))
        assert first == second
        assert one.block(index).history.final_loss < one.block(index).history.rounded_loss
    cut, whole = one.block(0).history, plain.block(0).history
    assert cut.rounded_loss == pytest.approx(whole.rounded_loss, rel=1e-5), "the same numbers in another order"
    assert cut.final_loss == pytest.approx(whole.final_loss, rel=0.1), "other windows in each step"


@given(
    st.sampled_from([(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 9)
)
def test_every_step_takes_an_equal_part_of_every_shard(
    layout: tuple[int, int], share: int, steps: int, seed: int
) -> None:
    count, world = layout
    size, batch = share * steps, share * count
    seen = []
    for rank in range(world):
        shards = Shards(count, rank, world)
        local = count // world * size
        parts = shards.batches(local, batch, torch.Generator().manual_seed(seed))
        assert torch.equal(shards.own(torch.arange(count * size)), torch.arange(local) + rank * local)
        seen.append([part + rank * local for part in parts])
        assert sorted(torch.cat(parts).tolist()) == list(range(local))
    together = [torch.cat(parts) for parts in zip(*seen, strict=True)]
    alone = Shards(count).batches(count * size, batch, torch.Generator().manual_seed(seed))
    assert len(together) == steps and all(map(torch.equal, together, alone))
    for part in alone:
        assert (part // size).bincount(minlength=count).tolist() == [share] * count


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 9))
def test_one_shard_is_the_plain_case(windows: int, batch: int, seed: int) -> None:
    found = ALONE.batches(windows, batch, torch.Generator().manual_seed(seed))
    expected = torch.randperm(windows, generator=torch.Generator().manual_seed(seed)).split(batch)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    (spread,) = ALONE.spread(windows, 16)
    assert spread.tolist() == [i * windows // min(16, windows) for i in range(min(16, windows))]
    assert ALONE.mean([0.1]) == 0.1 and ALONE.per_shard(batch) == ALONE.per_process(batch) == batch


def test_gradients_are_means_added_in_the_order_of_the_shards() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    values = torch.tensor([[1.0, 2.0], [1e8, 1.0], [-1e8, 1.0]])

    def step(order: list[int]) -> float:
        def work(windows: torch.Tensor) -> float:
            loss = (values[windows[0]] * weight).sum()
            loss.backward()
            return float(windows[0])

        return Shards(3).step([weight], torch.tensor(order), work)

    assert step([0, 1, 2]) == 1.0
    assert weight.grad.tolist() == [0.0, torch.tensor(4.0).div(3).item()], "(1 + 1e8) - 1e8 is 0 in float32"
    step([1, 2, 0])
    assert weight.grad[0].item() == torch.tensor(1.0).div(3).item(), "another order, other bits"


def test_one_infinite_loss_is_everybodys() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))

    def work(windows: torch.Tensor) -> float:
        return float("inf") if windows[0] else 1.0

    assert Shards(2).step([weight], torch.tensor([0, 1]), work) == float("inf")
    assert weight.grad is None


@pytest.mark.parametrize(
    ("shards", "recipe", "changes", "windows", "said"),
    [
        (Shards(3, 0, 2), "w4a8", (), 12, "2 processes cannot have as many of them each.*--shards"),
        (Shards(3), "w4a8", ("learning.batch=4",), 12, "learning.batch = 4 is not cut"),
        (Shards(2), "w4a8", ("learning.batch=4",), 10, "10 windows are no multiple of learning.batch = 4"),
        (Shards(4), "w4a8+signround", ("rounding.batch=2",), 8, "rounding.batch = 2 is not cut"),
        (Shards(2), "w4a8+gptq", (), 8, "GPTQ"),
        (Shards(2), "w8a8-static", (), 8, "static ranges"),
    ],
)
def test_what_does_not_fit_is_refused(
    shards: Shards, recipe: str, changes: tuple[str, ...], windows: int, said: str
) -> None:
    with pytest.raises(InputError, match=rf"shards do not fit .*{said}"):
        shards.refuse_unfit(load_recipe(recipe, changes), windows)


def test_what_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ALONE.refuse_unfit(load_recipe("w8a8-static"), 7)
    Shards(2, 1, 2).refuse_unfit(load_recipe("w4a8-g32+signround"), 8)
    assert open_shards() == ALONE and open_shards(4) == Shards(4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert open_shards() == Shards(2, 1, 2) and open_shards(4) == Shards(4, 1, 2)
    assert not open_shards().writes and ALONE.writes


@pytest.mark.parametrize(("world", "rank"), [("two", "0"), ("2", "2"), ("0", "0"), ("", "1"), ("2", "-1")])
def test_an_environment_that_torchrun_does_not_make_is_refused(
    monkeypatch: pytest.MonkeyPatch, world: str, rank: str
) -> None:
    """A process that takes itself for the second of one would wait for nobody and write nothing."""
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(InputError, match=f"RANK={rank}"):
        open_shards()
