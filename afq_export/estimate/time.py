"""Seconds of the stages: floating-point operations over speed, passes through weights, and what does not scale."""

from __future__ import annotations

import math
from collections.abc import Iterator

from afq_export.calibrate.rotation import step_operations
from afq_export.estimate.counts import block_elements, block_specs, dense_sites, fold_tokens, folds, streamed
from afq_export.job import Job
from afq_export.machine import Speed
from afq_export.spec.report import Size
from afq_export.spec.sites import Form, SiteKind
from afq_export.spec.strict import Data

EFFICIENCY = 0.95
"""Of the speed that large square products have, what a block's products reach."""
TOKEN_SECONDS = 3e-9
"""Of a token's forward pass besides products, for every number of its hidden and MLP widths: norms, grids, attention's
softmax. A backward pass takes twice that and twice the products."""
STEP_SECONDS = 0.007
"""What a learning step takes however small the block is: calls, optimiser."""
PASSES, AUGMENTED_PASSES, MEASURED_PASSES, BLOCK_SECONDS = 3.1, 1.0, 1.0, 0.07
"""Forward passes of a block over all windows: float, statistics, quantized; targets on the quantized path's input;
losses before and after what is learned; and seconds of the smallest block."""
PLAIN_PASSES, FOLD_PASSES, LEARN_PASSES = 4.6, 6.6, 10.6
"""Times that a block's weights are gone through: read, quantized and dequantized; with a transform folded into them;
where something is learned."""
STEP_WEIGHT_PASSES, ROUNDED_WEIGHT_PASSES = 2.5, 4.5
"""The same in a step of learning; and of learned rounding, whose parameters are as many as the weights."""
QUANTIZE_PLAIN_PASSES, QUANTIZE_PASSES = 1.2, 2.2
"""The same where the codes are written, without a transform and with one."""
MATRIX_PRODUCTS, MATRIX_STEP_PRODUCTS, MATRIX_QUANTIZE_PRODUCTS = 12, 3, 2
"""Times that dense transforms are inverted and multiplied into a block's weights, in products of float32, of which one
in float64 counts as two: besides learning, in a step of it, where the codes are written."""
SEARCHED, CLIPS, SEARCH_WEIGHT_PASSES, SEARCH_ROWS, SEARCH_SECONDS = 22, 21, 1.4, 512, 0.12
"""Diagonals of a search, each of which quantizes the weights behind its site and multiplies SEARCH_ROWS rows by two of
them; clipping factors; times that each goes through the weights; and seconds of the smallest block."""
WEIGHT_SECONDS, LARGE_WEIGHT_SECONDS = 5e-9, 1.5e-8
"""Of one weight in one pass; and where a linear is LARGE, whose temporaries are new pages every time, but for those of
a search, which goes through weights in parts."""
LARGE = 8 << 20
"""Weights of a linear from which the allocator gives its memory back at once (32 MB)."""
GPTQ_PASSES, GPTQ_WEIGHT_PASSES = 3.5, 30
"""Forward passes, and times that weights are gone through, of rounding a block by GPTQ, besides its Hessians and what
is made of them."""
TUNE_PASSES, TUNE_WEIGHT_PASSES = 3.2, 2.3
"""Forward passes of a window end to end: forward, backward twice that, the teacher's head; and times that all weights
are gone through for it: gradients are gathered window by window, and every step makes new weights."""
RUNG_PASSES, HEAD_PASSES = 8, 6
"""Forward passes that all rungs together cost, the integer reference counted by its time; of the head ..."""
LOGIT_SECONDS = 2.5e-7
"""... and what one logit takes to be compared, in float64, in all of them."""
CHECK_PASSES = 6
"""Forward passes of the windows that folding is checked on, in two precisions."""
EXPORT_SECONDS, EXPORT_BLOCK_SECONDS = 4.0, 0.27
"""What the exporter takes by itself, and for each block ..."""
ONNX_SECONDS, ONNX_BLOCK_SECONDS = 0.3, 0.02
"""... where it is ours, and no graph is traced."""
VALIDATE_SECONDS, ONNX_VALIDATE_SECONDS = 5.0, 0.5
"""What all rungs take with a program of nothing: the exporter makes a small one of every linear, our own writer too."""
WRITTEN_MB_SECOND, STREAMED_MB_SECOND = 60.0, 130.0
"""Of the program, in a second: put together, written, hashed, read back, compared, and run for its test vectors; and
tensor by tensor, without those."""


class Time(Data):
    """Estimated seconds of the stages, from `gflops` measured just now."""

    calibrate: float
    quantize: float
    lower: float
    validate: float
    gflops: Speed


def time(job: Job, speed: Speed, size: Size) -> Time:
    """Seconds of each stage: operations over speed, passes through weights, and what does not scale with them."""
    config = job.model.config
    ours = job.target.backend == "onnxruntime"
    export, per_block = (ONNX_SECONDS, ONNX_BLOCK_SECONDS) if ours else (EXPORT_SECONDS, EXPORT_BLOCK_SECONDS)
    written = size.total / 1e6 / (STREAMED_MB_SECOND if streamed(job, size) else WRITTEN_MB_SECOND)
    seen, seen_length = job.evaluation.ids_NT.numel(), job.evaluation.length
    blocks, head = config.layers * _token_seconds(job, seen_length, speed), _head_seconds(job, speed)
    checked = seen * (RUNG_PASSES * blocks + HEAD_PASSES * head + LOGIT_SECONDS * config.vocab)
    folded = fold_tokens(job) * CHECK_PASSES * (blocks + head)
    learned = _rotation_seconds(job, speed) + _end_to_end_seconds(job, speed)
    return Time(
        calibrate=round(config.layers * _block_seconds(job, speed) + learned, 1),
        quantize=round(_quantize_seconds(job, speed), 1),
        lower=round(export + per_block * config.layers + written, 1),
        validate=round((ONNX_VALIDATE_SECONDS if ours else VALIDATE_SECONDS) + checked + folded, 1),
        gflops=speed,
    )


def _block_seconds(job: Job, speed: Speed) -> float:
    """Calibration of one block; samples are shared by the processes."""
    recipe, rounding = job.recipe, job.recipe.rounding
    windows, length = job.calibration.ids_NT.shape
    tokens = windows * length / job.shards.world
    plain, learned, rounded = (
        _token_seconds(job, length, speed, precision)
        for precision in ("float32", recipe.learning.autocast, rounding.autocast)
    )
    weights, matrices = _weight_seconds(job), _matrix_seconds(job, speed)
    step = STEP_SECONDS + STEP_WEIGHT_PASSES * weights + MATRIX_STEP_PRODUCTS * matrices
    steps = recipe.learning.epochs * math.ceil(windows / recipe.learning.batch)
    passes = LEARN_PASSES if recipe.learns_blocks else FOLD_PASSES if folds(job) else PLAIN_PASSES
    augmented = recipe.learning.augmented_loss and recipe.activations.mode != "none"
    forward = PASSES + AUGMENTED_PASSES * augmented + MEASURED_PASSES * recipe.learns_blocks
    seconds = BLOCK_SECONDS + forward * tokens * plain + passes * weights + MATRIX_PRODUCTS * matrices
    seconds += _turning_seconds(job, block_elements(job), speed) + _search_seconds(job, speed)
    seconds += recipe.learning.epochs * 3 * tokens * learned + steps * step
    if rounding.method == "learned":
        share = rounding.steps * rounding.batch / windows
        seconds += share * 3 * tokens * rounded + rounding.steps * (STEP_SECONDS + ROUNDED_WEIGHT_PASSES * weights)
    elif rounding.method == "gptq":
        config, sides = job.model.config, 2 if rounding.asymmetric else 1
        hessians = _product_seconds(2 * sides * (3 * config.hidden**2 + config.intermediate**2), speed)
        seconds += tokens * (GPTQ_PASSES * rounded + hessians) + GPTQ_WEIGHT_PASSES * weights
        seconds += _product_seconds(3 * sum(_gptq_operations(job)), speed)
    return seconds


def _search_seconds(job: Job, speed: Speed) -> float:
    """Searches of one block's start values: of diagonals, for the weights behind their sites, and of clipping."""
    recipe, weights = job.recipe, {spec.role: spec.outputs * spec.inputs for spec in block_specs(job)}
    scaled = [choice.site for choice in job.choices if choice.form in (Form.DIAGONAL, Form.PER_HEAD)]
    behind = sum(weights[role] for site in scaled if site.kind is not SiteKind.Q_TO_K for role in site.consumers)
    seconds = 0.0
    if recipe.transforms.start == "search":
        products = _product_seconds(4 * min(SEARCH_ROWS, job.calibration.ids_NT.numel()) * behind, speed)
        seconds += SEARCH_SECONDS + SEARCHED * (SEARCH_WEIGHT_PASSES * behind * WEIGHT_SECONDS + products)
    if recipe.learning.clipping != "off":
        seconds += SEARCH_SECONDS + CLIPS * SEARCH_WEIGHT_PASSES * block_elements(job) * WEIGHT_SECONDS
    return seconds


def _rotation_seconds(job: Job, speed: Speed) -> float:
    """Learning the basis of the residual stream, if it is learned, and turning the token rows."""
    config, transforms = job.model.config, job.recipe.transforms
    seconds = _turning_seconds(job, config.vocab * config.hidden, speed)
    if transforms.rotation == "learned":
        seconds += transforms.rotation_steps * (4 * STEP_SECONDS + step_operations(config) / speed.float32 / 1e9)
    return seconds


def _quantize_seconds(job: Job, speed: Speed) -> float:
    """Reading, folding and rounding all blocks, token rows and head."""
    layers, rows = job.model.config.layers, 2 * job.model.config.vocab * job.model.config.hidden
    passes = QUANTIZE_PASSES if folds(job) else QUANTIZE_PLAIN_PASSES
    seconds = passes * (layers * _weight_seconds(job) + rows * WEIGHT_SECONDS)
    seconds += layers * MATRIX_QUANTIZE_PRODUCTS * _matrix_seconds(job, speed)
    return seconds + _turning_seconds(job, layers * block_elements(job) + rows, speed)


def _gptq_operations(job: Job) -> Iterator[float]:
    """In float64, for each linear of a block: two Cholesky factors and an inverse of its Hessian [I, I], and errors
    [O, I] of columns that are made good by all behind them."""
    for spec in block_specs(job):
        yield 4 / 3 * spec.inputs**3 + spec.outputs * spec.inputs**2


def _end_to_end_seconds(job: Job, speed: Speed) -> float:
    """Learning end to end, and the teacher's pass over its windows."""
    layers, tuned, length = job.model.config.layers, job.recipe.end_to_end, job.tuning.length
    if not tuned.steps:
        return 0.0
    blocks = layers * _token_seconds(job, length, speed, tuned.autocast)
    token = blocks + _head_seconds(job, speed, tuned.autocast)
    window = TUNE_PASSES * length * token + TUNE_WEIGHT_PASSES * layers * _weight_seconds(job)
    return tuned.steps * tuned.batch * window + job.tuning.ids_NT.numel() * blocks


def _token_seconds(job: Job, length: int, speed: Speed, precision: str = "float32") -> float:
    """The forward pass of one block for a token of a window of `length`."""
    config = job.model.config
    operations = 2 * block_elements(job) + 4 * length * config.heads * config.head_dim
    return _product_seconds(operations, speed, precision) + TOKEN_SECONDS * (config.hidden + config.intermediate)


def _head_seconds(job: Job, speed: Speed, precision: str = "float32") -> float:
    """Logits of one token."""
    return _product_seconds(2 * job.model.config.vocab * job.model.config.hidden, speed, precision)


def _product_seconds(operations: float, speed: Speed, precision: str = "float32") -> float:
    """Products of so many floating-point operations."""
    gflops = speed.bfloat16 if precision == "bfloat16" else speed.float32
    return operations / (EFFICIENCY * gflops * 1e9)


def _weight_seconds(job: Job) -> float:
    """One pass through the weights of a block."""
    counts = [spec.outputs * spec.inputs for spec in block_specs(job)]
    return sum(n * (LARGE_WEIGHT_SECONDS if n > LARGE else WEIGHT_SECONDS) for n in counts)


def _matrix_seconds(job: Job, speed: Speed) -> float:
    """Inverting the dense transforms of a block and multiplying them into the weights on both sides of their sites."""
    weights = {spec.role: spec.outputs * spec.inputs for spec in block_specs(job)}
    operations = 0
    for site in dense_sites(job):
        beside = sum(weights.get(name, 0) for name in site.producers + site.consumers)
        operations += 2 * site.head_dim * beside + 2 * site.heads * site.head_dim**3
    return _product_seconds(operations, speed)


def _turning_seconds(job: Job, weights: int, speed: Speed) -> float:
    """Multiplying `weights` by the basis of the residual stream, in float64; nothing without a rotation."""
    if job.recipe.transforms.rotation == "off":
        return 0.0
    return 2 * _product_seconds(2 * weights * job.model.config.hidden, speed)
