"""Learning one block: AffineQuant's optimisation with its gradual mask, and what happens when it diverges."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import block, family
from afq_export.arch.ops import Ops, Weights
from afq_export.calibrate.activations import Rows
from afq_export.calibrate.ops import QuantizedPathOps, Records, block_loss, matmuls_in, quantized_weights
from afq_export.calibrate.parameters import BlockParameters
from afq_export.calibrate.shards import ALONE, Shards
from afq_export.calibrate.tensors import TensorGrids, static_ops
from afq_export.fold.sites import fold_block
from afq_export.fold.transform import condition_number, dominance_margin
from afq_export.quantize.tensors import TensorBits
from afq_export.spec.history import EpochRecord
from afq_export.spec.recipe import FLOAT_CACHE, KvCache, Learning
from afq_export.spec.sites import Form

RETRIES = 3
"""A block that diverges is tried again with a tenth of the stability factor this many times."""

MEASURED, TOLD = 16, 4
"""Windows that a block's loss is measured on when none are held out, and when nothing is chosen by it."""

HELD_SHARE = 4
"""One in so many windows may be held out at most."""

EXPLODED = 2.0
"""An epoch whose loss is this many times the start's has exploded."""


@dataclasses.dataclass(frozen=True)
class BlockProblem:
    """What a block is learned on: its float weights, its grids, inputs of the quantized path and targets [N, T, D],
    and the tokens' weights in the loss [N, T, 1]."""

    config: DecoderConfig
    weights: Weights
    records: Records
    inputs: Rows
    targets: tuple[Rows, ...]
    token_weights: Tensor
    tensor_bits: TensorBits | None = None
    """Where every tensor of the block lies on a static grid: of how many bits (tensors.py)."""
    kv_cache: KvCache = FLOAT_CACHE
    shards: Shards = ALONE
    """Windows are those of this process."""
    held_out: int = 0
    """Windows of all processes that nothing is learned on; less when there are few (`measured`)."""
    most_measured: int = MEASURED
    """Windows of all processes that losses are measured on when none are held out."""

    def measured(self) -> list[Tensor]:
        """The windows that losses are measured on, shard by shard: those held out, else `most_measured` over all."""
        windows = len(self.inputs)
        most = min(self.held_out, windows * self.shards.world // HELD_SHARE)
        return self.shards.spread(windows, most if self.holds_out else self.most_measured)

    def batches(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        """This process' windows of every step of an epoch, in random order; none that is held out."""
        learned = torch.ones(len(self.inputs), dtype=torch.bool)
        if self.holds_out:
            learned[torch.cat(self.measured())] = False
        windows = learned.nonzero()[:, 0]
        return [windows[part] for part in self.shards.batches(len(windows), batch, generator)]

    @property
    def holds_out(self) -> bool:
        """Whether there are windows enough to hold some out."""
        return self.held_out > 0 and len(self.inputs) // self.shards.local >= HELD_SHARE

    def ops(self, weights: Weights) -> Ops:
        """The quantized path with quantized `weights`, static grids over what each call shows."""
        if self.tensor_bits:
            return static_ops(self.config, weights, TensorGrids(self.config, self.tensor_bits))
        return QuantizedPathOps(self.config, weights, self.records, kv_cache=self.kv_cache)


@dataclasses.dataclass(frozen=True)
class Learned:
    """The parameters that were kept, the stability factor they are masked with, and how they came about."""

    parameters: BlockParameters
    opened: float
    stability_factor: float
    start_loss: float
    final_loss: float
    epochs: tuple[EpochRecord, ...]
    events: tuple[str, ...]


class Diverged(Exception):
    """The loss is not finite or exploded, or a matrix lost diagonal dominance."""


def learn_block(
    problem: BlockProblem, start: BlockParameters, learning: Learning, seed: int, tick: Callable[[int, int], None]
) -> Learned:
    """Learns `start` (left unchanged) for `learning.epochs`. The result is never worse than the start.

    On divergence the block goes back to the start and is tried again with a tenth of the stability factor; after
    RETRIES, or when no matrix has off-diagonals to damp, the start values stand. They also stand when learning went
    well but found nothing better. `tick(epoch, epochs)`: progress.
    """
    alpha, events, history = learning.stability_factor, [], []
    start_loss = measure(problem, start, 0.0, alpha, learning.batch)
    retries = RETRIES if alpha and any(site.form is Form.PER_HEAD for site in start.sites) else 0
    for attempt in range(retries + 1 if learning.epochs else 0):
        parameters = copy.deepcopy(start)
        try:
            best = _epochs(problem, parameters, learning, alpha, start_loss, seed, tick, history)
            final = measure(problem, parameters, best, alpha, learning.batch)
            if final <= start_loss:
                return Learned(parameters, best, alpha, start_loss, final, tuple(history), tuple(events))
            events.append(f"nothing better than the start was learned ({final:.3e}, start {start_loss:.3e}); it stands")
            break
        except (Diverged, torch.linalg.LinAlgError) as reason:
            what = "start values kept" if attempt == retries else f"tried again with stability factor {alpha / 10:g}"
            events.append(f"stability factor {alpha:g}: {reason}; rolled back, {what}")
            alpha /= 10
    return Learned(start, 0.0, learning.stability_factor, start_loss, start_loss, tuple(history), tuple(events))


def quantized_block_weights(
    problem: BlockProblem, p: BlockParameters, opened: float, alpha: float
) -> dict[str, Tensor]:
    """Folded, then fake-quantized weights of the block, float32, differentiable in the parameters."""
    sites = family(problem.config).fold_sites(problem.config)
    folded = fold_block(sites, p.transforms(opened, alpha), problem.weights)
    return quantized_weights(folded, p.clips(), problem.records)


@torch.no_grad()
def measure(problem: BlockProblem, p: BlockParameters, opened: float, alpha: float, batch: int) -> float:
    """The loss of these parameters (see `held_loss`)."""
    return held_loss(problem, quantized_block_weights(problem, p, opened, alpha), batch)


@torch.no_grad()
def held_loss(problem: BlockProblem, weights: Weights, batch: int) -> float:
    """The loss of a block with quantized `weights` in float32, on the windows that are held out; where none are, on up
    to `most_measured` windows spread over all."""
    shards = problem.shards

    def of(windows: Tensor) -> float:
        parts = windows.split(shards.per_shard(batch))
        return sum(float(block_output_loss(problem, weights, part)) * len(part) for part in parts) / len(windows)

    return shards.mean([of(windows) for windows in problem.measured()])


def _epochs(
    problem: BlockProblem,
    parameters: BlockParameters,
    learning: Learning,
    alpha: float,
    start_loss: float,
    seed: int,
    tick: Callable[[int, int], None],
    history: list[EpochRecord],
) -> float:
    """All epochs, each added to `history`; `parameters` become those of the best one, and how far its mask was open is
    returned. Raises Diverged."""
    generator = torch.Generator().manual_seed(seed)
    groups = [g for g in parameters.groups(learning.learning_rate, learning.clipping_rate) if g["params"]]
    if not groups:
        return 1.0
    kept, at = copy.deepcopy(parameters.state_dict()), 0
    least = math.inf
    optimiser = torch.optim.AdamW(groups, weight_decay=learning.weight_decay)
    scheduler: torch.optim.lr_scheduler.LambdaLR | None = None
    for epoch in range(1, learning.epochs + 1):
        opened, losses = epoch / learning.epochs, []
        batches = problem.batches(learning.batch, generator)
        if scheduler is None:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, _course(learning, len(batches) * learning.epochs))
        for part in batches:
            losses.append(train_step(problem, parameters, opened, alpha, part, learning) * len(part))
            optimiser.step()
            scheduler.step()
        loss = sum(losses) / sum(len(part) for part in batches)
        held = measure(problem, parameters, opened, alpha, learning.batch) if problem.held_out else None
        record = _record(parameters, epoch, loss, held if problem.holds_out else None, opened, alpha)
        _refuse_not_finite(record)
        history.append(record)
        _check(record, start_loss)
        judged = loss if held is None else held
        if judged < least:
            kept, at, least = copy.deepcopy(parameters.state_dict()), epoch, judged
        tick(epoch, learning.epochs)
        if learning.patience and epoch - at >= learning.patience:
            break
    parameters.load_state_dict(kept)
    return at / learning.epochs


def train_step(
    problem: BlockProblem, p: BlockParameters, opened: float, alpha: float, part: Tensor, learning: Learning
) -> float:
    """Forward and backward on the windows `part`: gradients are set, the loss is returned. Raises Diverged."""

    def run(windows: Tensor) -> float:
        weights = quantized_block_weights(problem, p, opened, alpha)
        with matmuls_in(learning.autocast, problem.token_weights.device):
            loss = block_output_loss(problem, weights, windows)
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()
        return value

    p.zero_grad(set_to_none=True)
    value = problem.shards.step(list(p.parameters()), part, run)
    if not math.isfinite(value):
        raise Diverged("the loss is not finite")
    return value


def block_output_loss(problem: BlockProblem, weights: Weights, part: Tensor) -> Tensor:
    """The loss on the windows `part` with these folded and fake-quantized weights."""
    y = block(problem.config, problem.ops(weights), problem.inputs[part])
    return block_loss(y, tuple(t[part] for t in problem.targets), problem.token_weights[part])


def _course(learning: Learning, steps: int) -> Callable[[int], float]:
    """Factor on the learning rates at a step."""
    if learning.schedule == "constant":
        return lambda step: 1.0
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


@torch.no_grad()
def _record(
    p: BlockParameters, epoch: int, loss: float, held: float | None, opened: float, alpha: float
) -> EpochRecord:
    transforms = p.transforms(opened, alpha, torch.float64).values()
    return EpochRecord(
        epoch,
        loss,
        min((dominance_margin(t) for t in transforms), default=1.0),
        max((condition_number(t) for t in transforms), default=1.0),
        alpha,
        held,
    )


def _refuse_not_finite(record: EpochRecord) -> None:
    """Before it enters the history: JSON has no word for it."""
    held = 0.0 if record.held is None else record.held
    if not all(math.isfinite(v) for v in (record.loss, record.dominance, record.condition, held)):
        raise Diverged(f"epoch {record.epoch}: a number is not finite")


def _check(record: EpochRecord, start_loss: float) -> None:
    if record.loss > EXPLODED * start_loss:
        raise Diverged(f"epoch {record.epoch}: the loss exploded to {record.loss:.3e} from {start_loss:.3e}")
    if record.dominance <= 0:
        raise Diverged(f"epoch {record.epoch}: diagonal dominance is lost (margin {record.dominance:.3f})")
