"""What a run will take: peak memory and seconds of its stages, before anything is done.

Counted are floating-point operations, the tensors that a stage holds at once, and how often it goes through a block's
weights; the constants were measured (examples/benchmarks/README.md, scale). W weights of a block's linears.
"""

from __future__ import annotations

import math

from afq_export.calibrate.rotation import step_operations
from afq_export.job import Job, activations
from afq_export.runfolder import peak_rss_mb
from afq_export.spec.report import Size
from afq_export.spec.strict import Data

FOLD_COPIES = 4.3
"""Times 4 W bytes, of a block whose weights are only rounded: themselves, in float64, and folded."""
LEARN_COPIES = 6.5
"""The same where something is learned: float, folded, ranges, fake-quantized, their gradients, temporaries."""
ROW_COPIES = 1.6
"""Times the token rows in float32, while they are read."""
HESSIANS = 4
"""Float64 matrices [I, I] of a linear that GPTQ holds at once."""
TAPE = 14
"""Hidden-width tensors that a block's backward pass keeps per token, besides MLP and attention."""
SPARE = 2
"""Windows' activations in memory when the others are in files: a batch's inputs and results."""
EFFICIENCY = 0.5
"""Of the speed that large square products have, what a block's products and small operators reach together."""
STEP_PASSES = 3.5
"""Forward passes that one learning step costs: forward, backward twice that, fake quantization."""
STEP_SECONDS = 0.03
"""What a learning step takes besides matmuls on a tiny block: calls, optimiser, small operators."""
PASSES = 8
"""Forward passes of a block besides learning: float, statistics, losses, quantized."""
WEIGHT_PASSES, STEP_WEIGHT_PASSES = 4.0, 2.5
"""Times that a block's weights are gone through: read, folded, quantized and dequantized; in a step of learning."""
SEARCHED, SEARCH_ROWS = 22, 512
"""Candidates of a search, each of which quantizes the weights twice and multiplies SEARCH_ROWS rows by two of them."""
WEIGHT_SECONDS, LARGE_WEIGHT_SECONDS = 5e-9, 2e-8
"""Of one weight in one pass; and where a linear is LARGE, whose temporaries are new pages every time."""
LARGE = 8 << 20
"""Weights of a linear from which the allocator gives its memory back at once (32 MB)."""
GPTQ_PASSES = 8
"""Forward passes, and times that weights are gone through, of rounding a block by GPTQ."""
TUNED_BYTES = 13
"""Of one weight while scales are learned end to end: its code, itself, what gradients are gathered at, gradients."""
LOGITS = 5
"""Copies of a window's logits of one model, their logarithms and gradients."""
TUNE_PASSES = 4.5
"""Forward passes of a step end to end: forward, backward twice that, weights, the teacher's head."""
RUNG_PASSES = 8
"""Forward passes that all rungs and the layer checks together cost, the integer reference counted by its time."""
PROGRAM_COPIES = 4
"""Copies of the program in memory while it is put together, written, read back and loaded."""
STREAMED_COPIES = 6
"""Times the codes of the largest linear or table, where a program is written and read back tensor by tensor."""
EXPORT_MB, EXPORT_SECONDS = 120.0, 12.0
"""What the exporter takes by itself ..."""
ONNX_MB, ONNX_SECONDS = 40.0, 3.0
"""... where it is ours, and no graph is traced."""
WRITTEN_MB_SECOND = 20.0
"""Of the program, in a second: put together, written, hashed, read back and compared."""


class Memory(Data):
    """Estimated peak memory in MB; `process` is what this program takes before it starts. `activations` of calibration
    are `spilled` to files when they are more than they may be."""

    process: float
    calibrate: float
    lower: float
    activations: float
    spilled: bool


class Time(Data):
    """Estimated seconds, from `gflops` measured just now."""

    calibrate: float
    lower: float
    validate: float
    gflops: float


def memory(job: Job, size: Size) -> Memory:
    """Peaks of calibration (activations, one block, one batch's backward pass) and of lowering (the program)."""
    process, held = peak_rss_mb(), activations(job)
    window = job.calibration.length * job.model.config.hidden * 4
    kept = SPARE * job.recipe.learning.batch * window / 1e6 if held.spilled else held.needed_mb
    work = max(_block_bytes(job), ROW_COPIES * _row_bytes(job), _end_to_end_bytes(job)) / 1e6
    return Memory(
        process=process,
        calibrate=round(process + kept + work),
        lower=round(process + _lowering_mb(job, size)),
        activations=round(held.needed_mb),
        spilled=held.spilled,
    )


def _block_bytes(job: Job) -> float:
    """What calibrating one block takes besides activations of all windows."""
    config, recipe, length = job.model.config, job.recipe, job.calibration.length
    weights = 4 * block_elements(job)
    batch = recipe.learning.batch * length
    if not recipe.learning.epochs and recipe.rounding.method != "learned":
        widest = max(record.spec.inputs for record in job.records.values())
        hessians = HESSIANS * 8 * widest**2 if recipe.rounding.method == "gptq" else 0
        return FOLD_COPIES * weights + hessians
    tape = batch * (TAPE * config.hidden + 8 * config.intermediate + 4 * config.heads * length) * 4
    return LEARN_COPIES * weights + tape


def _end_to_end_bytes(job: Job) -> float:
    """What the whole model takes while it is learned end to end, a window at a time."""
    config, length = job.model.config, job.tuning.length
    if not job.recipe.end_to_end.steps:
        return 0.0
    tape = config.layers * length * (TAPE * config.hidden + 8 * config.intermediate) * 2
    logits = LOGITS * length * config.vocab * 4
    return TUNED_BYTES * config.layers * block_elements(job) + 3 * _row_bytes(job) + tape + logits


def _lowering_mb(job: Job, size: Size) -> float:
    """What writing the program takes. A large ONNX file is never whole in memory."""
    options = job.target.onnx
    if job.target.backend != "onnxruntime" or options is None:
        return EXPORT_MB + (PROGRAM_COPIES * size.total + 3 * _row_bytes(job)) / 1e6
    largest = max(r.spec.outputs * r.spec.inputs for r in job.records.values())
    streamed = STREAMED_COPIES * largest / 1e6
    whole = PROGRAM_COPIES * size.total / 1e6 if size.total <= 1e6 * options.vectors_mb else 0
    return ONNX_MB + max(streamed, whole)


def time(job: Job, gflops: float, size: Size) -> Time:
    """Seconds of each stage: operations over speed, passes through weights, and what does not scale with them."""
    config, recipe = job.model.config, job.recipe
    speed = EFFICIENCY * gflops * 1e9
    seen, seen_length = job.evaluation.ids_NT.numel(), job.evaluation.length
    operations = seen * (config.layers * _block_operations(job, seen_length) + 2 * config.vocab * config.hidden)
    rotation = 0.0
    if recipe.transforms.rotation == "learned":
        rotation = recipe.transforms.rotation_steps * (STEP_SECONDS + step_operations(config) / gflops / 1e9)
    ours = job.target.backend == "onnxruntime"
    export = ONNX_SECONDS if ours else EXPORT_SECONDS
    return Time(
        calibrate=round(config.layers * _block_seconds(job, speed) + rotation + _end_to_end_seconds(job, speed), 1),
        lower=round(export + size.total / 1e6 / WRITTEN_MB_SECOND, 1),
        validate=round(EXPORT_SECONDS + RUNG_PASSES * operations / gflops / 1e9, 1),
        gflops=round(gflops, 1),
    )


def _block_seconds(job: Job, speed: float) -> float:
    """Calibration of one block at `speed` operations a second; samples are shared by the processes."""
    recipe = job.recipe
    windows, length = job.calibration.ids_NT.shape
    forward = windows * length * _block_operations(job, length) / speed / job.shards.world
    linears = [r.spec.outputs * r.spec.inputs for r in job.records.values() if r.spec.block == 0]
    weights = sum(n * (LARGE_WEIGHT_SECONDS if n > LARGE else WEIGHT_SECONDS) for n in linears)
    step = STEP_SECONDS + STEP_WEIGHT_PASSES * weights
    steps = recipe.learning.epochs * math.ceil(windows / recipe.learning.batch)
    seconds = PASSES * forward + WEIGHT_PASSES * weights
    seconds += recipe.learning.epochs * STEP_PASSES * forward + steps * step
    if recipe.transforms.start == "search" or recipe.learning.clipping != "off":
        seconds += SEARCHED * (2 * weights + 4 * SEARCH_ROWS * sum(linears) / speed)
    if recipe.rounding.method == "learned":
        share = recipe.rounding.steps * recipe.rounding.batch / windows
        seconds += share * STEP_PASSES * forward + recipe.rounding.steps * step
    elif recipe.rounding.method == "gptq":
        seconds += GPTQ_PASSES * (forward + weights)
    return seconds


def _end_to_end_seconds(job: Job, speed: float) -> float:
    """Learning end to end, and the teacher's pass over its windows."""
    config, tuned, length = job.model.config, job.recipe.end_to_end, job.tuning.length
    if not tuned.steps:
        return 0.0
    token = config.layers * _block_operations(job, length) + 2 * config.vocab * config.hidden
    learned = TUNE_PASSES * tuned.steps * tuned.batch * length * token
    return (learned + job.tuning.ids_NT.numel() * config.layers * _block_operations(job, length)) / speed


def block_elements(job: Job) -> int:
    """Weights of the linears of one block."""
    return sum(r.spec.outputs * r.spec.inputs for r in job.records.values() if r.spec.block == 0)


def _row_bytes(job: Job) -> int:
    """Token rows in float32."""
    return job.model.config.vocab * job.model.config.hidden * 4


def _block_operations(job: Job, length: int) -> int:
    """Floating-point operations of one block per token of a window of `length`."""
    config = job.model.config
    return 2 * block_elements(job) + 4 * length * config.heads * config.head_dim
