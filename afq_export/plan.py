"""What a run would do, before it does it: transforms, kernels, and estimates of size, memory and time.

Sizes are counted; memory and time are estimated, from counts of floating-point operations and of tensors that stages
hold at once, with the constants below. N windows, T tokens each, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.backends import backend
from afq_export.fold.forms import SiteChoice
from afq_export.job import Job, Prepared
from afq_export.load.model import expected_shapes
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.report.layers import LayerGroup, layer_groups
from afq_export.runfolder import peak_rss_mb
from afq_export.spec.quant import ScaleType
from afq_export.spec.recipe import Embedding, Rounding
from afq_export.spec.report import Site, Size
from afq_export.spec.strict import Data
from afq_export.spec.target import TargetProfile

HELD = 6
"""Copies of all calibration activations at a block's end: inputs and outputs of both paths, a target, a result."""
WEIGHT_COPIES = 8
"""Copies of a block's weights while it is learned: float, folded, fake-quantized, their gradients, temporaries."""
TAPE = 14
"""Hidden-width tensors that a block's backward pass keeps per token, besides MLP and attention."""
STEP_PASSES = 3.5
"""Forward passes that one learning step costs: forward, backward twice that, fake quantization."""
STEP_SECONDS = 0.03
"""What a learning step takes besides matmuls on a tiny block: calls, optimiser, small operators."""
ELEMENTS_PER_SECOND = 2.5e8
"""Weights that are folded and fake-quantized, forth and back, in a second."""
GPTQ_PASSES = 8
"""Forward passes, and times that weights are gone through, of rounding a block by GPTQ."""
SEARCH_PASSES = 22
"""Times that clipping and start values quantize a block's weights when they are searched."""
RUNG_PASSES = 8
"""Forward passes that all rungs and the layer checks together cost, the integer reference counted by its time."""
PROGRAM_COPIES = 4
"""Copies of the program in memory while it is put together, written, read back and loaded."""
EXPORT_MB, EXPORT_SECONDS = 120.0, 12.0
"""What the exporter takes by itself."""


class Memory(Data):
    """Estimated peak memory in MB; `process` is what this program takes before it starts."""

    process: float
    calibrate: float
    lower: float


class Time(Data):
    """Estimated seconds, from `gflops` measured just now."""

    calibrate: float
    lower: float
    validate: float
    gflops: float


class Plan(Data, kw_only=True):
    """Everything that `plan` says."""

    model: str
    parameters: int
    blocks: int
    hidden: int
    vocabulary: int
    recipe: str
    target: str
    file: str
    out: str
    defaults: tuple[str, ...]
    calibration: str
    evaluation: str
    embedding: str
    rotation: str
    rounding: str
    sites: tuple[Site, ...]
    layers: tuple[LayerGroup, ...]
    size: Size
    memory: Memory
    time: Time


def plan(job: Job, gflops: float) -> Plan:
    """The plan of `job` on a machine that multiplies matrices at `gflops` 10^9 operations a second."""
    config, calibration, evaluation = job.model.config, job.calibration, job.evaluation
    size = program_size(job)
    return Plan(
        model=job.model.name,
        parameters=sum(math.prod(shape) for shape in expected_shapes(config).values()),
        blocks=config.layers,
        hidden=config.hidden,
        vocabulary=config.vocab,
        recipe=job.recipe.name,
        target=job.target.name,
        file=backend(job.target.backend).PROGRAM,
        out=str(job.out),
        defaults=job.defaults,
        calibration=f"{len(calibration.ids_NT)} windows of {calibration.length} tokens of {calibration.corpus}",
        evaluation=f"{len(evaluation.ids_NT)} windows of {evaluation.length} tokens of {evaluation.corpus}",
        embedding=_embedding(job),
        rotation=job.recipe.transforms.rotation,
        rounding=_rounding(job.recipe.rounding),
        sites=sites(job),
        layers=layer_groups(job.records),
        size=size,
        memory=memory(job, size),
        time=time(job, gflops, size),
    )


def program_size(job: Prepared) -> Size:
    """Bytes of the program, counted: codes, scales, biases, rows, norms; what the format adds by its backend."""
    config, records, target = job.model.config, list(job.records.values()), job.target
    *blocks, head = (linear_bytes(record, target) for record in records)
    norms = 4 * (_parameters(config) - sum(r.spec.outputs * r.spec.inputs for r in records[:-1]))
    return Size(
        linears=sum(blocks),
        head=head,
        embedding=row_bytes(job, records[-1], job.recipe.embedding),
        rest=norms + backend(target.backend).overhead(config, job.records, target),
    )


def linear_bytes(record: LinearRecord, target: TargetProfile) -> int:
    """Codes as the kernel stores them, a scale per group, a bias in 32 bits where there is one."""
    spec, kernel = record.spec, target.kernel(record.kernel)
    scale = {ScaleType.FLOAT32: 4, ScaleType.STEPS: 1}.get(kernel.scale_type, 2)
    codes = spec.outputs * math.ceil(spec.inputs * kernel.stored_bits / 8)
    return codes + spec.outputs * (spec.groups * scale + (4 if spec.bias else 0))


def row_bytes(job: Prepared, head: LinearRecord, embedding: Embedding) -> int:
    """Token rows and their scales; 0 where they are one tensor with the head."""
    config = job.model.config
    tied = config.tied and job.recipe.transforms.rotation == "off"
    if tied and backend(job.target.backend).shares_rows(head, embedding, job.target):
        return 0
    groups = 0 if embedding.bits == 32 else config.hidden // embedding.group if embedding.group else 1
    return config.vocab * (config.hidden * embedding.bits // 8 + 4 * groups)


def memory(job: Job, size: Size) -> Memory:
    """Peaks of calibration (activations, one block, one batch's backward pass) and of lowering (the program)."""
    config, learning = job.model.config, job.recipe.learning
    tokens, length = job.calibration.ids_NT.numel(), job.calibration.length
    activations = HELD * tokens * config.hidden * 4
    weights = WEIGHT_COPIES * _block_elements(job) * 4
    batch = learning.batch * length
    tape = batch * (TAPE * config.hidden + 8 * config.intermediate + 4 * config.heads * length) * 4
    rows = config.vocab * config.hidden * 4
    process = peak_rss_mb()
    calibrate = process + (max(activations + weights + tape, activations + rows)) / 1e6
    lower = process + EXPORT_MB + (PROGRAM_COPIES * size.total + 3 * rows) / 1e6
    return Memory(process=process, calibrate=round(calibrate), lower=round(lower))


def time(job: Job, gflops: float, size: Size) -> Time:
    """Seconds of each stage: operations over speed, plus what does not scale with them."""
    config, recipe = job.model.config, job.recipe
    windows, length = job.calibration.ids_NT.shape
    forward = windows * length * _block_operations(job, length) / gflops / 1e9
    searched = recipe.transforms.start == "search" or recipe.learning.clipping != "off"
    passes = 6 + (1 if recipe.learning.augmented_loss else 0)
    weights = _block_elements(job) / ELEMENTS_PER_SECOND
    steps = recipe.learning.epochs * math.ceil(windows / recipe.learning.batch)
    learning = recipe.learning.epochs * STEP_PASSES * forward + steps * (STEP_SECONDS + weights)
    block = passes * forward + learning + (SEARCH_PASSES if searched else 2) * weights
    if recipe.rounding.method == "learned":
        share = recipe.rounding.steps * recipe.rounding.batch / windows
        block += share * STEP_PASSES * forward + recipe.rounding.steps * (STEP_SECONDS + weights)
    elif recipe.rounding.method == "gptq":
        block += GPTQ_PASSES * (forward + weights)
    seen, seen_length = job.evaluation.ids_NT.numel(), job.evaluation.length
    head = 2 * config.vocab * config.hidden
    operations = seen * (config.layers * _block_operations(job, seen_length) + head)
    return Time(
        calibrate=round(config.layers * block, 1),
        lower=round(EXPORT_SECONDS + size.total / 2e7, 1),
        validate=round(EXPORT_SECONDS + RUNG_PASSES * operations / gflops / 1e9, 1),
        gflops=round(gflops, 1),
    )


def _embedding(job: Job) -> str:
    embedding = job.recipe.embedding
    if embedding.bits == 32:
        return "float32 rows"
    return f"int{embedding.bits} rows, a scale per {f'{embedding.group} columns' if embedding.group else 'row'}"


def _rounding(rounding: Rounding) -> str:
    return f"learned, {rounding.steps} steps a block" if rounding.method == "learned" else rounding.method


def _parameters(config: DecoderConfig) -> int:
    """Parameters besides token rows and head: the blocks, norms, learned positions."""
    outer = family(config).embedding_names(config) | family(config).head_names(config)
    rows = {outer["embed_tokens.weight"], outer["lm_head.weight"]}
    return sum(math.prod(shape) for key, shape in expected_shapes(config).items() if key not in rows)


def _block_elements(job: Job) -> int:
    """Weights of the linears of one block."""
    return sum(r.spec.outputs * r.spec.inputs for r in job.records.values() if r.spec.block == 0)


def _block_operations(job: Job, length: int) -> int:
    """Floating-point operations of one block per token of a window of `length`."""
    config = job.model.config
    return 2 * _block_elements(job) + 4 * length * config.heads * config.head_dim


def sites(job: Job) -> tuple[Site, ...]:
    """What the recipe does at every fold site of a block."""
    return tuple(_site(choice) for choice in job.choices)


def _site(choice: SiteChoice) -> Site:
    site = choice.site
    refused = dict(site.refused)
    if choice.shift_reason:
        refused["shift"] = choice.shift_reason
    return Site(
        name=site.name,
        kind=site.kind.value,
        producers=site.producers,
        consumers=site.consumers,
        asked=choice.asked,
        form=choice.form.value if choice.form else None,
        shift=choice.shift,
        reason=choice.reason,
        refused=refused,
    )
