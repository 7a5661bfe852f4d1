"""What a run will take: peak memory and seconds of its stages, before anything is done.

Counted are floating-point operations, the tensors that a stage holds at once, and how often it goes through a block's
weights; the constants were measured (examples/benchmarks/README.md, scale). W weights of a block's linears.
"""

from __future__ import annotations

import math

from afq_export.calibrate.rotation import step_operations
from afq_export.job import Job, activations
from afq_export.machine import peak_rss_mb, resident_mb
from afq_export.spec.report import Size
from afq_export.spec.strict import Data

FOLD_COPIES = 4.3
"""Times 4 W bytes, of a block whose weights are only rounded: themselves, in float64, and folded."""
LEARN_COPIES = 7.0
"""The same where something is learned: float, folded, ranges, fake-quantized, masks, their gradients, temporaries."""
QUANTIZE_COPIES = 4.3
"""The same while a block is folded and its codes are written."""
ROW_COPIES = 2.0
"""Times the token rows in float32, while they are read."""
HESSIANS = 4
"""Float64 matrices [I, I] of a linear that GPTQ holds at once."""
TAPE = 14
"""Hidden-width tensors that a block's backward pass keeps per token, besides MLP and attention."""
SPARE = 2
"""Windows' activations in memory when the others are in files: a batch's inputs and results."""
EFFICIENCY = 0.9
"""Of the speed that large square products have, what a block's products reach."""
HALF_SPEED = 2.0
"""How many times as fast products of bfloat16 are, where the processor has them."""
TOKEN_SECONDS = 1.2e-8
"""Of a token's forward pass besides products, for every number of its hidden and MLP widths: norms, grids, attention's
softmax. A backward pass takes twice that and twice the products."""
STEP_SECONDS = 0.007
"""What a learning step takes however small the block is: calls, optimiser."""
PASSES, BLOCK_SECONDS = 5.0, 0.07
"""Forward passes of a block besides learning: float, targets, statistics, losses, quantized; and of the smallest."""
WEIGHT_PASSES, STEP_WEIGHT_PASSES, QUANTIZE_PASSES = 4.0, 2.5, 2.0
"""Times that a block's weights are gone through: read, folded, quantized and dequantized; in a step of learning; where
the codes are written."""
SEARCHED, SEARCH_ROWS, SEARCH_SECONDS = 22, 512, 0.12
"""Candidates of a search, each of which quantizes the weights twice and multiplies SEARCH_ROWS rows by two of them; and
of the smallest block."""
WEIGHT_SECONDS, LARGE_WEIGHT_SECONDS = 5e-9, 2e-8
"""Of one weight in one pass; and where a linear is LARGE, whose temporaries are new pages every time."""
LARGE = 8 << 20
"""Weights of a linear from which the allocator gives its memory back at once (32 MB)."""
GPTQ_PASSES, GPTQ_WEIGHT_PASSES = 3.5, 30
"""Forward passes, and times that weights are gone through, of rounding a block by GPTQ, besides its Hessians."""
TUNED_BYTES = 13
"""Of one weight while scales are learned end to end: its code, itself, what gradients are gathered at, gradients."""
MOVED_BYTES = 16
"""The same more where codes are learned too: an offset, its gradient, two moments."""
LOGITS = 3
"""Copies of a window's logits in float32: of both models, and gradients, in bfloat16; logarithms of a part."""
KEPT_WEIGHTS = 0.6
"""Of a head's attention weights, what learning end to end keeps: those at and below the diagonal, by parts."""
TUNE_PASSES = 3.2
"""Forward passes of a step end to end: forward, backward twice that, weights, the teacher's head."""
RUNG_PASSES, HEAD_PASSES = 8, 6
"""Forward passes that all rungs together cost, the integer reference counted by its time; of the head ..."""
LOGIT_SECONDS = 2.5e-7
"""... and what one logit takes to be compared, in float64, in all of them."""
FOLD_WINDOWS, FOLD_PASSES = 2, 6
"""Windows that folding is checked on, and forward passes of it, in two precisions."""
PROGRAM_COPIES = 4
"""Copies of the program in memory while it is put together, written, read back and loaded."""
STREAMED_COPIES = 6
"""Times the codes of the largest linear or table, where a program is written and read back tensor by tensor."""
EXPORT_MB, EXPORT_SECONDS, EXPORT_BLOCK_SECONDS = 80.0, 4.0, 0.27
"""What the exporter takes by itself, and for each block ..."""
ONNX_MB, ONNX_SECONDS, ONNX_BLOCK_SECONDS = 40.0, 0.3, 0.02
"""... where it is ours, and no graph is traced."""
VALIDATE_MB, VALIDATE_SECONDS, ONNX_VALIDATE_SECONDS = 115.0, 5.0, 0.5
"""What all rungs take with a program of nothing: the exporter makes a small one of every linear, our own writer too."""
FLOAT_ROWS, FOLD_LOGITS = 4, 4
"""Copies of the float token rows while rungs run, and of the fold check's logits in float64."""
WRITTEN_MB_SECOND = 60.0
"""Of the program, in a second: put together, written, hashed, read back and compared."""


class Memory(Data):
    """Estimated peak memory of the stages in MB; `process` is what this program takes before them. `activations` of
    calibration are `spilled` to files when they are more than they may be."""

    process: float
    calibrate: float
    quantize: float
    lower: float
    validate: float
    activations: float
    spilled: bool


class Time(Data):
    """Estimated seconds of the stages, from `gflops` measured just now."""

    calibrate: float
    quantize: float
    lower: float
    validate: float
    gflops: float


def memory(job: Job, size: Size) -> Memory:
    """Peaks of calibration (activations, one block, one batch's backward pass), of folding a block, of lowering and
    running the program. None is below what the process has taken at most before."""
    peak, process, held = peak_rss_mb(), resident_mb(), activations(job)
    window = job.calibration.length * job.model.config.hidden * 4
    kept = SPARE * job.recipe.learning.batch * window / 1e6 if held.spilled else held.needed_mb
    work = max(_block_bytes(job), ROW_COPIES * _row_bytes(job), _end_to_end_bytes(job)) / 1e6
    folding = max(QUANTIZE_COPIES * 4 * block_elements(job), ROW_COPIES * _row_bytes(job)) / 1e6
    return Memory(
        process=peak,
        calibrate=round(max(peak, process + kept + work)),
        quantize=round(max(peak, process + folding)),
        lower=round(max(peak, process + _lowering_mb(job, size))),
        validate=round(max(peak, process + _validating_mb(job, size))),
        activations=round(held.needed_mb),
        spilled=held.spilled,
    )


def _block_bytes(job: Job) -> float:
    """What calibrating one block takes besides activations of all windows."""
    config, recipe, length = job.model.config, job.recipe, job.calibration.length
    weights = 4 * block_elements(job)
    batch = recipe.learning.batch * length
    if not recipe.learns_blocks:
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
    kept = TAPE * config.hidden + 8 * config.intermediate + KEPT_WEIGHTS * config.heads * length
    tape = 2 * config.layers * length * kept
    logits = LOGITS * length * config.vocab * 4
    each = TUNED_BYTES + (MOVED_BYTES if job.recipe.end_to_end.code_rate else 0)
    return each * config.layers * block_elements(job) + 3 * _row_bytes(job) + tape + logits


def _lowering_mb(job: Job, size: Size) -> float:
    """What writing the program takes. A large ONNX file is never whole in memory of its own, but mapped."""
    options = job.target.onnx
    if job.target.backend != "onnxruntime" or options is None:
        return EXPORT_MB + (PROGRAM_COPIES * size.total + 3 * _row_bytes(job)) / 1e6
    largest = max(r.spec.outputs * r.spec.inputs for r in job.records.values())
    streamed = (STREAMED_COPIES * largest + size.total) / 1e6
    whole = PROGRAM_COPIES * size.total / 1e6 if size.total <= 1e6 * options.vectors_mb else 0
    return ONNX_MB + max(streamed, whole)


def _validating_mb(job: Job, size: Size) -> float:
    """What running all rungs takes: float rows, logits of the fold check, and the program."""
    logits = 8 * _fold_tokens(job) * job.model.config.vocab
    return VALIDATE_MB + (PROGRAM_COPIES * size.total + FLOAT_ROWS * _row_bytes(job) + FOLD_LOGITS * logits) / 1e6


def time(job: Job, gflops: float, size: Size) -> Time:
    """Seconds of each stage: operations over speed, passes through weights, and what does not scale with them."""
    config, recipe = job.model.config, job.recipe
    rotation = 0.0
    if recipe.transforms.rotation == "learned":
        rotation = recipe.transforms.rotation_steps * (4 * STEP_SECONDS + step_operations(config) / gflops / 1e9)
    ours = job.target.backend == "onnxruntime"
    export, per_block = (ONNX_SECONDS, ONNX_BLOCK_SECONDS) if ours else (EXPORT_SECONDS, EXPORT_BLOCK_SECONDS)
    written = size.total / 1e6 / WRITTEN_MB_SECOND
    seen, seen_length = job.evaluation.ids_NT.numel(), job.evaluation.length
    blocks, head = config.layers * _token_seconds(job, seen_length, gflops), _head_seconds(job, gflops)
    checked = seen * (RUNG_PASSES * blocks + HEAD_PASSES * head + LOGIT_SECONDS * config.vocab)
    folded = _fold_tokens(job) * FOLD_PASSES * (blocks + head)
    tuned = _end_to_end_seconds(job, gflops)
    weights = config.layers * _weight_seconds(job) + 2 * config.vocab * config.hidden * WEIGHT_SECONDS
    return Time(
        calibrate=round(config.layers * _block_seconds(job, gflops) + rotation + tuned, 1),
        quantize=round(QUANTIZE_PASSES * weights, 1),
        lower=round(export + per_block * config.layers + written, 1),
        validate=round((ONNX_VALIDATE_SECONDS if ours else VALIDATE_SECONDS) + checked + folded, 1),
        gflops=round(gflops, 1),
    )


def _block_seconds(job: Job, gflops: float) -> float:
    """Calibration of one block; samples are shared by the processes."""
    recipe, rounding = job.recipe, job.recipe.rounding
    windows, length = job.calibration.ids_NT.shape
    tokens = windows * length / job.shards.world
    plain, learned, rounded = (
        _token_seconds(job, length, gflops, precision)
        for precision in ("float32", recipe.learning.autocast, rounding.autocast)
    )
    weights = _weight_seconds(job)
    step = STEP_SECONDS + STEP_WEIGHT_PASSES * weights
    steps = recipe.learning.epochs * math.ceil(windows / recipe.learning.batch)
    seconds = BLOCK_SECONDS + PASSES * tokens * plain + WEIGHT_PASSES * weights
    seconds += recipe.learning.epochs * 3 * tokens * learned + steps * step
    if recipe.transforms.start == "search" or recipe.learning.clipping != "off":
        products = _product_seconds(4 * SEARCH_ROWS * block_elements(job), gflops)
        seconds += SEARCH_SECONDS + SEARCHED * (2 * weights + products)
    if rounding.method == "learned":
        share = rounding.steps * rounding.batch / windows
        seconds += share * 3 * tokens * rounded + rounding.steps * step
    elif rounding.method == "gptq":
        config, sides = job.model.config, 2 if rounding.asymmetric else 1
        hessians = _product_seconds(2 * sides * (3 * config.hidden**2 + config.intermediate**2), gflops)
        seconds += tokens * (GPTQ_PASSES * rounded + hessians) + GPTQ_WEIGHT_PASSES * weights
    return seconds


def _end_to_end_seconds(job: Job, gflops: float) -> float:
    """Learning end to end, and the teacher's pass over its windows."""
    layers, tuned, length = job.model.config.layers, job.recipe.end_to_end, job.tuning.length
    if not tuned.steps:
        return 0.0
    blocks = layers * _token_seconds(job, length, gflops, tuned.autocast)
    token = blocks + _head_seconds(job, gflops, tuned.autocast)
    return TUNE_PASSES * tuned.steps * tuned.batch * length * token + job.tuning.ids_NT.numel() * blocks


def _token_seconds(job: Job, length: int, gflops: float, precision: str = "float32") -> float:
    """The forward pass of one block for a token of a window of `length`."""
    config = job.model.config
    operations = 2 * block_elements(job) + 4 * length * config.heads * config.head_dim
    return _product_seconds(operations, gflops, precision) + TOKEN_SECONDS * (config.hidden + config.intermediate)


def _fold_tokens(job: Job) -> int:
    """Tokens that folding is checked on."""
    return min(FOLD_WINDOWS * job.evaluation.length, job.evaluation.ids_NT.numel())


def _head_seconds(job: Job, gflops: float, precision: str = "float32") -> float:
    """Logits of one token."""
    return _product_seconds(2 * job.model.config.vocab * job.model.config.hidden, gflops, precision)


def _product_seconds(operations: float, gflops: float, precision: str = "float32") -> float:
    """Products of so many floating-point operations."""
    factor = HALF_SPEED if precision == "bfloat16" else 1.0
    return operations / (EFFICIENCY * gflops * 1e9) / factor


def _weight_seconds(job: Job) -> float:
    """One pass through the weights of a block."""
    return sum(n * (LARGE_WEIGHT_SECONDS if n > LARGE else WEIGHT_SECONDS) for n in _block_linears(job))


def block_elements(job: Job) -> int:
    """Weights of the linears of one block."""
    return sum(_block_linears(job))


def _block_linears(job: Job) -> list[int]:
    """Weights of each linear of a block."""
    return [r.spec.outputs * r.spec.inputs for r in job.records.values() if r.spec.block == 0]


def _row_bytes(job: Job) -> int:
    """Token rows in float32."""
    return job.model.config.vocab * job.model.config.hidden * 4
