"""Calibration by several processes: samples are shared out; the bytes do not depend on how many processes there are.

Blocks need each other's results, so what is parallel is samples. They are cut into `count` shards of equal size; every
process has as many of them. A step takes an equal part of its windows from every shard; losses, gradients and
statistics are computed shard by shard and added in the order of the shards, by every process alike. Float addition is
not associative, so the number of shards decides the last bits of what is learned; the number of processes does not.

Processes are started by torchrun and talk through torch.distributed (gloo). One shard in one process is the plain case:
nothing is cut, gathered or added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from afq_export.errors import InputError
from afq_export.spec.recipe import Recipe

PATIENCE = datetime.timedelta(days=7)
"""How long processes wait for the one that does something alone; torchrun ends them all when one fails."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """`count` shards in all, of which this process, number `rank` of `world`, has `local` neighbouring ones."""

    count: int = 1
    rank: int = 0
    world: int = 1

    @property
    def local(self) -> int:
        """Shards of this process."""
        return self.count // self.world

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files and says something."""
        return self.rank == 0

    def own(self, rows: Tensor) -> Tensor:
        """The windows of this process, out of all."""
        size = len(rows) // self.world
        return rows[self.rank * size : (self.rank + 1) * size]

    def per_shard(self, batch: int) -> int:
        """Windows that a batch takes from every shard."""
        return max(1, batch // self.count)

    def per_process(self, batch: int) -> int:
        """Windows of a batch that are this process'."""
        return batch // self.world

    def batches(self, windows: int, batch: int, generator: torch.Generator) -> list[Tensor]:
        """This process' part of every step of an epoch, in random order; an equal number of windows of each shard.

        Every process draws for all shards, so that generators stay alike.
        """
        if self.count == 1:
            return list(torch.randperm(windows, generator=generator).split(batch))
        size, first = windows // self.local, self.rank * self.local
        orders = [torch.randperm(size, generator=generator) for _ in range(self.count)]
        own = torch.stack([orders[first + i] + i * size for i in range(self.local)])
        return [part.flatten() for part in own.split(self.per_shard(batch), dim=1)]

    def spread(self, windows: int, most: int) -> list[Tensor]:
        """Up to `most` windows over all shards, evenly spaced: those of this process, shard by shard."""
        size = windows // self.local
        count = max(1, min(most // self.count, size))
        return [i * size + torch.arange(count) * size // count for i in range(self.local)]

    def gather(self, rows: Tensor) -> Tensor:
        """Everybody's `rows` in the order of the shards; all have the same shape."""
        if self.world == 1:
            return rows
        found = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(found, rows.contiguous())
        return torch.cat(found)

    def mean(self, values: Sequence[float]) -> float:
        """Mean over all shards of one number for each of this process' shards."""
        if self.count == 1:
            return values[0]
        return sum(self.gather(torch.tensor(values, dtype=torch.float64)).tolist()) / self.count

    def step(self, parameters: Sequence[Tensor], part: Tensor, run: Callable[[Tensor], float]) -> float:
        """Loss and gradients over the windows `part` of one step, one of `batches`.

        `run(windows)` leaves gradients of `parameters` and returns the loss; where that is not finite it leaves none,
        and then nobody has any.
        """
        if self.count == 1:
            return run(part)
        learned = [p for p in parameters if p.requires_grad]
        losses, gradients = [], []
        for windows in part.view(self.local, -1):
            for parameter in learned:
                parameter.grad = None
            losses.append(run(windows))
            gradients.append([parameter.grad for parameter in learned])
        loss = self.mean(losses)
        if math.isfinite(loss):
            for parameter, *found in zip(learned, *gradients, strict=True):
                parameter.grad = self._mean([g if g is not None else torch.zeros_like(parameter) for g in found])
        return loss

    def wait(self) -> None:
        """Until everybody is here."""
        if self.world > 1:
            dist.barrier()

    def refuse_unfit(self, recipe: Recipe, windows: int) -> None:
        """Raises InputError unless the recipe can be calibrated on these shards of `windows` windows."""
        if self.count % self.world:
            why = f"{self.world} processes cannot have as many of them each"
            raise _unfit(self.count, why, f"take a multiple of {self.world} with --shards")
        if self.count == 1:
            return
        batches = {"learning.batch": recipe.learning.batch}
        if recipe.rounding.method == "learned":
            batches["rounding.batch"] = recipe.rounding.batch
        for key, batch in batches.items():
            if batch % self.count:
                raise _unfit(self.count, f"{key} = {batch} is not cut into as many parts", f"set {key} to a multiple")
        if windows % recipe.learning.batch:
            why = f"{windows} windows are no multiple of learning.batch = {recipe.learning.batch}"
            raise _unfit(self.count, why, "set samples.windows to one")
        if recipe.end_to_end.steps:
            raise _unfit(self.count, "nothing end to end is cut into shards", "set end_to_end.steps = 0, or take 1")
        if recipe.rounding.method == "gptq":
            raise _unfit(self.count, "GPTQ adds one Hessian over all windows", "take 1, or another method")
        if recipe.activations.mode == "static" or any(rule.activations == "static" for rule in recipe.override):
            raise _unfit(self.count, "static ranges are found on all windows", "take 1, or dynamic activations")

    def _mean(self, tensors: list[Tensor]) -> Tensor:
        """Mean over all shards of one tensor for each of this process' shards, added in their order."""
        first, *others = self.gather(torch.stack(tensors))
        total = first.clone()
        for other in others:
            total += other
        return total.div_(self.count)


ALONE = Shards()


def open_shards(count: int | None = None) -> Shards:
    """This process' part of `count` shards; None: as many as torchrun has started processes, 1 without it.

    Raises InputError when the environment says something that torchrun would not.
    """
    said = {name: os.environ.get(name) or usual for name, usual in (("WORLD_SIZE", "1"), ("RANK", "0"))}
    if not all(text.isdecimal() for text in said.values()) or int(said["RANK"]) >= int(said["WORLD_SIZE"]):
        where = ", ".join(f"{name}={text}" for name, text in said.items())
        why = "these variables of the environment number the processes that torchrun starts"
        raise InputError("processes that cannot be", where=where, why=why, do="unset both")
    return Shards(count or int(said["WORLD_SIZE"]), int(said["RANK"]), int(said["WORLD_SIZE"]))


@contextlib.contextmanager
def connected(shards: Shards) -> Iterator[None]:
    """Connects the processes as long as the body runs."""
    if shards.world == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _unfit(count: int, why: str, do: str) -> InputError:
    return InputError("shards do not fit", where=f"{count} shards", why=why, do=do)
