"""Peak memory of the stages: the tensors that each holds at once. W weights of a block's linears."""

from __future__ import annotations

from afq_export.estimate.counts import block_elements, dense_sites, fold_tokens, folds, row_bytes, streamed
from afq_export.job import Job, activations
from afq_export.machine import peak_rss_mb, resident_mb
from afq_export.spec.report import Size
from afq_export.spec.strict import Data

PLAIN_COPIES, FOLD_COPIES = 3.6, 5.9
"""Times 4 W bytes, of a block whose weights are only rounded: themselves and their codes; and where a transform is
folded into them: in float64, and folded."""
LEARN_COPIES = 7.4
"""The same where something is learned: float, folded, ranges, fake-quantized, masks, their gradients, temporaries."""
QUANTIZE_PLAIN_COPIES, QUANTIZE_COPIES = 3.4, 5.4
"""The same while codes are written, without a transform and with one."""
ROW_COPIES, TURNED_ROW_COPIES = 2.0, 5.2
"""Times the token rows in float32, while they are read; and rotated, in float64."""
HESSIANS = 6
"""Float64 matrices [I, I] of a linear that GPTQ holds at once."""
MATRIX_BYTES = 46
"""Of one number of a matrix that is learned: itself, gradient, two moments, mask, inverse and what is kept of it."""
TAPE = 14
"""Hidden-width tensors that a block's backward pass keeps per token, besides MLP and attention."""
SPARE = 2
"""Windows' activations in memory when the others are in files: a batch's inputs and results."""
TUNED_BYTES = 12
"""Of one weight while scales are learned end to end: its code, itself, what gradients are gathered at, gradients."""
MOVED_BYTES = 14
"""The same more where codes are learned too: an offset, its gradient, two moments."""
LOGITS = 3
"""Copies of a window's logits in float32: of both models, and gradients, in bfloat16; logarithms of a part."""
KEPT_WEIGHTS = 0.6
"""Of a head's attention weights, what learning end to end keeps: those at and below the diagonal, by parts."""
PROGRAM_COPIES = 4
"""Copies of the program in memory while it is put together, written, read back and loaded."""
STREAMED_COPIES = 6
"""Times the codes of the largest linear or table, where a program is written and read back tensor by tensor."""
EXPORT_MB, ONNX_MB = 80.0, 40.0
"""What the exporter takes by itself; and where it is ours, and no graph is traced."""
VALIDATE_MB = 115.0
"""What all rungs take with a program of nothing: the exporter makes a small one of every linear."""
FLOAT_ROWS, FOLD_LOGITS = 4, 4
"""Copies of the float token rows while rungs run, and of the fold check's logits in float64."""


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


def memory(job: Job, size: Size) -> Memory:
    """Peaks of calibration (activations, one block, one batch's backward pass), of folding a block, of lowering and
    running the program. None is below what the process has taken at most before."""
    peak, process, held = peak_rss_mb(), resident_mb(), activations(job)
    window = job.calibration.length * job.model.config.hidden * 4
    rows = (ROW_COPIES if job.recipe.transforms.rotation == "off" else TURNED_ROW_COPIES) * row_bytes(job)
    kept = SPARE * job.recipe.learning.batch * window / 1e6 if held.spilled else held.needed_mb
    learned = job.tuning.ids_NT.shape[0] * window / 1e6
    blocks = kept + max(_block_bytes(job), rows) / 1e6
    whole = min(kept, learned) + _end_to_end_bytes(job) / 1e6 if job.recipe.end_to_end.steps else 0.0
    copies = QUANTIZE_COPIES if folds(job) else QUANTIZE_PLAIN_COPIES
    folding = max(copies * 4 * block_elements(job), rows) / 1e6
    return Memory(
        process=peak,
        calibrate=round(max(peak, process + blocks, process + whole)),
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
        return (FOLD_COPIES if folds(job) else PLAIN_COPIES) * weights + hessians
    tape = batch * (TAPE * config.hidden + 8 * config.intermediate + 4 * config.heads * length) * 4
    matrices = MATRIX_BYTES * sum(site.heads * site.head_dim**2 for site in dense_sites(job))
    return LEARN_COPIES * weights + matrices + tape


def _end_to_end_bytes(job: Job) -> float:
    """What the whole model takes while it is learned end to end, a window at a time, besides hidden states."""
    config, length = job.model.config, job.tuning.length
    kept = TAPE * config.hidden + 8 * config.intermediate + KEPT_WEIGHTS * config.heads * length
    tape = 2 * config.layers * length * kept
    logits = LOGITS * length * config.vocab * 4
    each = TUNED_BYTES + (MOVED_BYTES if job.recipe.end_to_end.code_rate else 0)
    return each * config.layers * block_elements(job) + 3 * row_bytes(job) + tape + logits


def _lowering_mb(job: Job, size: Size) -> float:
    """What writing the program takes. A large ONNX file is never whole in memory."""
    if job.target.backend != "onnxruntime":
        return EXPORT_MB + (PROGRAM_COPIES * size.total + 3 * row_bytes(job)) / 1e6
    largest = max(r.spec.outputs * r.spec.inputs for r in job.records.values())
    whole = 0 if streamed(job, size) else PROGRAM_COPIES * size.total
    return ONNX_MB + max(STREAMED_COPIES * largest, whole) / 1e6


def _validating_mb(job: Job, size: Size) -> float:
    """What running all rungs takes: float rows, logits of the fold check, and the program."""
    logits = 8 * fold_tokens(job) * job.model.config.vocab
    return VALIDATE_MB + (PROGRAM_COPIES * size.total + FLOAT_ROWS * row_bytes(job) + FOLD_LOGITS * logits) / 1e6
