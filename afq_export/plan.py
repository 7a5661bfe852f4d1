"""What a run would do, before it does it: transforms, kernels, size, and estimates of memory and time (estimate/).

Sizes are counted to the byte. N windows, T tokens each, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.backends import backend
from afq_export.estimate.memory import Memory, memory
from afq_export.estimate.time import Time, time
from afq_export.fold.forms import SiteChoice
from afq_export.fold.online import online_costs
from afq_export.job import Job, Prepared
from afq_export.load.model import expected_shapes
from afq_export.machine import Speed
from afq_export.quantize.cache import cache_facts
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.report.layers import LayerGroup, layer_groups
from afq_export.spec.cache import Cache
from afq_export.spec.online import OnlineCost
from afq_export.spec.quant import ScaleType
from afq_export.spec.recipe import Embedding, Rounding
from afq_export.spec.report import Site, Size
from afq_export.spec.strict import Data
from afq_export.spec.target import TargetProfile


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
    kv_cache: Cache | None
    rotation: str
    rounding: str
    end_to_end: str
    sites: tuple[Site, ...]
    online: tuple[OnlineCost, ...]
    layers: tuple[LayerGroup, ...]
    size: Size
    memory: Memory
    time: Time


def plan(job: Job, speed: Speed) -> Plan:
    """The plan of `job` on a machine that multiplies matrices at `speed`."""
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
        kv_cache=cache_facts(job.recipe.kv_cache, config, job.target),
        rotation=job.recipe.transforms.rotation,
        rounding=_rounding(job.recipe.rounding),
        end_to_end=_end_to_end(job),
        sites=sites(job),
        online=online_costs(config, job.recipe.transforms),
        layers=layer_groups(job.records),
        size=size,
        memory=memory(job, size),
        time=time(job, speed, size),
    )


def program_size(job: Prepared) -> Size:
    """Bytes of the program, counted: codes, scales, biases, rows, norms, matrices that stay in it; what the format adds
    by its backend."""
    config, records, target = job.model.config, list(job.records.values()), job.target
    *blocks, head = (linear_bytes(record, target) for record in records)
    norms = 4 * (_parameters(config) - sum(r.spec.outputs * r.spec.inputs for r in records[:-1]))
    online = sum(cost.bytes for cost in online_costs(config, job.recipe.transforms))
    return Size(
        linears=sum(blocks),
        head=head,
        embedding=row_bytes(job, records[-1], job.recipe.embedding),
        rest=norms + online + backend(target.backend).overhead(config, job.records, target),
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


def _embedding(job: Job) -> str:
    embedding = job.recipe.embedding
    if embedding.bits == 32:
        return "float32 rows"
    return f"int{embedding.bits} rows, a scale per {f'{embedding.group} columns' if embedding.group else 'row'}"


def _end_to_end(job: Job) -> str:
    steps = job.recipe.end_to_end.steps
    return f"{steps} steps on {len(job.tuning.ids_NT)} windows" if steps else "nothing"


def _rounding(rounding: Rounding) -> str:
    return f"learned, {rounding.steps} steps a block" if rounding.method == "learned" else rounding.method


def _parameters(config: DecoderConfig) -> int:
    """Parameters besides token rows and head: the blocks, norms, learned positions."""
    outer = family(config).embedding_names(config) | family(config).head_names(config)
    rows = {outer["embed_tokens.weight"], outer["lm_head.weight"]}
    return sum(math.prod(shape) for key, shape in expected_shapes(config).items() if key not in rows)


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
