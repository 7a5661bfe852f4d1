"""The calibrate stage: blocks one after another, each against its float self, resumable after every block.

The float path's output of a block is the next block's float input; the quantized path's output, computed with the
very integers of the block that will ship, is the next block's quantized input (AffineQuant, arXiv 2403.12544, section
3.1). Both paths start from the float embedding rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import block, embed, family
from afq_export.arch.ops import FloatOps, Ops, Weights
from afq_export.calibrate.activations import IN_MEMORY, ActivationStore, Rows
from afq_export.calibrate.learn import MEASURED, TOLD, BlockProblem, Learned, learn_block, measure
from afq_export.calibrate.ops import QuantizedPathOps, in_parts, moved, token_power, token_weights
from afq_export.calibrate.outer import head_grids, rows_grid
from afq_export.calibrate.parameters import BlockParameters
from afq_export.calibrate.ranges import observe_ranges, observe_tensors
from afq_export.calibrate.result import BlockResult, Calibration, block_path, read_block, write_block, write_outer
from afq_export.calibrate.rounding import round_block, rounded_weights
from afq_export.calibrate.shards import ALONE, Shards
from afq_export.calibrate.start import start_parameters
from afq_export.calibrate.statistics import input_statistics
from afq_export.calibrate.tensors import linear_ranges, static_ops
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.fold.forms import SiteChoice, choose_forms
from afq_export.fold.sites import fold_block
from afq_export.fold.transform import SiteTransform
from afq_export.load.checkpoint import DecoderWeights
from afq_export.load.corpus import Windows
from afq_export.progress import Progress
from afq_export.quantize.activations import fake_quantize_static
from afq_export.quantize.assign import HEAD
from afq_export.quantize.checkpoint import LinearRecord, StaticRange
from afq_export.quantize.quantize import quantize_block
from afq_export.quantize.tensors import TensorBits, visit_grids
from afq_export.spec.history import History
from afq_export.spec.quant import linear_name
from afq_export.spec.recipe import Autocast, Recipe


def calibrate(
    model: DecoderWeights,
    recipe: Recipe,
    records: Mapping[str, LinearRecord],
    windows: Windows,
    folder: Path,
    seed: int,
    progress: Progress,
    tensor_bits: TensorBits | None = None,
    store: ActivationStore = IN_MEMORY,
    shards: Shards = ALONE,
) -> Calibration:
    """Learns every block and writes its result to `folder`; blocks whose file is there are not learned again.

    `records`: grid and kernel of every linear, from `assign`. A resumed run ends in the same bytes: a block's learning
    depends on the seed, its index and its inputs only, and the inputs are recomputed with the same operations.
    `tensor_bits`: of the grids that every tensor gets, None when only linears are static. `store`: where activations of
    all windows are kept; it changes no bit. With several processes (shards.py) each has its own windows; the first one
    writes, into a folder that all of them see.
    """
    config, batch, device = model.config, shards.per_shard(recipe.learning.batch), store.device
    ids_NT = shards.own(windows.ids_NT).to(device)
    shape = torch.Size((*ids_NT.shape, config.hidden))
    choices = choose_forms(config, recipe.transforms)
    calibration = Calibration(folder, config.layers)
    folded = FoldedCheckpoint(model, calibration.transforms())
    rows = moved(model.embedding(), device)
    x_float = x_quant = store.collect((embed(config, rows, ids) for ids in ids_NT.split(batch)), shape)
    outer: dict[str, StaticRange] = {}
    if tensor_bits:
        hidden = outer["hidden"] = rows_grid(rows, tensor_bits.of("hidden"))
        x_quant = store.collect((fake_quantize_static(x, hidden) for x in x_float.split(batch)), shape)
    del rows
    for index in range(config.layers):
        weights = moved(model.block(index), device)
        roles = family(config).linear_shapes(config)
        of_block = {role: records[linear_name(index, role)] for role in roles}
        y_float = run_block(config, FloatOps(config, weights), x_float, batch, store)
        path = block_path(folder, index)
        progress("calibrate", index, config.layers)
        if not _done(path, shards):
            targets = _targets(config, weights, x_float, x_quant, y_float, recipe, batch, store)
            power = torch.cat([token_power(y) for y in y_float.split(batch)])
            importance = token_weights(power, shards.gather(power).mean(), recipe.learning.loss)
            problem = BlockProblem(
                config,
                weights,
                of_block,
                x_quant,
                targets,
                importance,
                tensor_bits,
                recipe.kv_cache,
                shards,
                recipe.learning.held_out,
                MEASURED if recipe.learns_blocks else TOLD,
            )
            exact = functools.partial(_exact, model, index, device)
            result = _learn(
                problem, exact, x_float, choices, recipe, seed + index, index, config.layers, progress, store
            )
            if shards.writes:
                write_block(path, result)
            shards.wait()
            del problem, targets, result
        del weights  # of the next lines, each has the block's weights in a form of its own
        if index + 1 < config.layers or tensor_bits:
            x_quant = _quantized_output(folded, read_block(path), records, index, x_quant, recipe, batch, store)
        x_float = y_float
    if tensor_bits:
        clip, head = calibration.head_clip(records[HEAD].spec).to(device), moved(folded.head(), device)
        write_outer(folder, outer | head_grids(config, head, records[HEAD], clip, x_quant, recipe, tensor_bits))
    progress("calibrate", config.layers, config.layers)
    return calibration


def _exact(model: DecoderWeights, index: int, device: torch.device) -> dict[str, Tensor]:
    """A block's weights in float64."""
    return moved(model.block(index, torch.float64), device)


def _done(path: Path, shards: Shards) -> bool:
    """Whether a block's result is there, as the process that writes sees it."""
    return bool(shards.gather(torch.tensor([path.exists()]))[0])


def _targets(
    config: DecoderConfig,
    weights: Weights,
    x_float: Rows,
    x_quant: Rows,
    y_float: Rows,
    recipe: Recipe,
    batch: int,
    store: ActivationStore,
) -> tuple[Rows, ...]:
    """What the quantized block is to come near: the float path's output and, augmented, the float block's output
    on the quantized path's own input."""
    if not recipe.learning.augmented_loss or recipe.activations.mode == "none" or x_quant is x_float:
        return (y_float,)
    return (y_float, run_block(config, FloatOps(config, weights), x_quant, batch, store))


def _learn(
    problem: BlockProblem,
    exact: Callable[[], Weights],
    x_float: Rows,
    choices: tuple[SiteChoice, ...],
    recipe: Recipe,
    seed: int,
    index: int,
    layers: int,
    progress: Progress,
    store: ActivationStore,
) -> BlockResult:
    """Start values, learning, rounding, static ranges of one block. `exact` reads its weights in float64; `x_float` is
    the float path's input."""
    batch, shards = recipe.learning.batch, problem.shards
    part = shards.per_shard(batch)
    statistics = input_statistics(problem.config, problem.weights, problem.inputs, part, shards)
    start = start_parameters(choices, recipe, problem.weights, statistics, problem.records)
    rounded = measure(problem, _plain(problem), 0.0, 0.0, batch)

    def tick(epoch: int, epochs: int) -> None:
        progress(f"calibrate: block {index + 1} of {layers}, epoch", epoch, epochs)

    learned = learn_block(problem, start, recipe.learning, seed, tick)
    transforms = _transforms(learned)
    sites = family(problem.config).fold_sites(problem.config)
    folded = fold_block(sites, transforms, exact())
    folded = {name: folded.pop(name).float() for name in list(folded)}
    clips = {role: clip.detach() for role, clip in learned.parameters.clips().items()}
    done = round_block(problem, folded, clips, recipe.rounding, x_float, seed, tick, store)
    ranges, tensors = {}, {}
    activations = [record.spec.activation for record in problem.records.values()]
    if problem.tensor_bits:
        tensors = observe_tensors(problem, rounded_weights(problem, folded, done), recipe.ranges.method, batch)
        ranges = linear_ranges(tensors, problem.records)
    elif any(grid is not None and not grid.dynamic for grid in activations):
        ranges = observe_ranges(problem, rounded_weights(problem, folded, done), recipe.ranges.method, batch)
    final = learned.final_loss if done.loss is None else done.loss
    history = History(rounded, learned.start_loss, final, learned.epochs, learned.events)
    return BlockResult(transforms, done.clips, ranges, history, done.codes, tensors)


@torch.no_grad()
def _transforms(learned: Learned) -> dict[str, SiteTransform]:
    """The masked matrices in float64: what is folded and saved."""
    transforms = learned.parameters.transforms(learned.opened, learned.stability_factor, torch.float64)
    return {name: transform.detached() for name, transform in transforms.items()}


def _plain(problem: BlockProblem) -> BlockParameters:
    """No transform and no clipping: round-to-nearest, the yardstick of every block."""
    specs = {role: record.spec for role, record in problem.records.items()}
    new = problem.token_weights.new_full
    return BlockParameters([], {role: new((s.outputs, s.groups), torch.inf) for role, s in specs.items()}, False)


def _quantized_output(
    folded: FoldedCheckpoint,
    result: BlockResult,
    records: Mapping[str, LinearRecord],
    index: int,
    x: Rows,
    recipe: Recipe,
    batch: int,
    store: ActivationStore,
) -> Rows:
    """The block's output with the integers, scales and ranges that the quantize stage will write."""
    part = quantize_block(folded, result, records, index)
    weights = {key.removeprefix("float."): tensor for key, tensor in part.floats.items()}
    for linear in part.linears:
        weights[f"{linear.spec.role}.weight"] = linear.dequantized()
        if linear.bias is not None:
            weights[f"{linear.spec.role}.bias"] = linear.bias
    weights = moved(weights, store.device)
    final = {linear.spec.role: linear.record for linear in part.linears}
    if result.tensors:
        ops: Ops = static_ops(folded.config, weights, visit_grids(result.tensors))
    else:
        ops = QuantizedPathOps(folded.config, weights, final, result.ranges or None, recipe.kv_cache)
    return run_block(folded.config, ops, x, batch, store)


@torch.no_grad()
def run_block(
    config: DecoderConfig,
    ops: Ops,
    x_NTD: Rows,
    batch: int,
    store: ActivationStore = IN_MEMORY,
    precision: Autocast = "float32",
) -> Rows:
    """One block over all windows, `batch` at a time, matmuls in `precision`."""
    return store.collect(in_parts(functools.partial(block, config, ops), precision, batch, x_NTD), x_NTD.shape)
