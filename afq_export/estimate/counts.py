"""What both estimates count: weights, sites, rows and tokens of a job."""

from __future__ import annotations

from afq_export.job import Job
from afq_export.spec.quant import LinearSpec
from afq_export.spec.report import Size
from afq_export.spec.sites import FoldSite, Form

CHECK_WINDOWS = 2
"""Windows that folding is checked on."""


def streamed(job: Job, size: Size) -> bool:
    """Whether the program is too large for test vectors, so that only one tensor of it is in memory at a time."""
    options = job.target.onnx
    return job.target.backend == "onnxruntime" and options is not None and size.total > 1e6 * options.vectors_mb


def fold_tokens(job: Job) -> int:
    """Tokens that folding is checked on."""
    return min(CHECK_WINDOWS * job.evaluation.length, job.evaluation.ids_NT.numel())


def dense_sites(job: Job) -> list[FoldSite]:
    """Sites of a block at which matrices over a whole head, or the whole width, are learned."""
    return [choice.site for choice in job.choices if choice.form is Form.PER_HEAD]


def folds(job: Job) -> bool:
    """Whether anything is folded into the weights."""
    return job.recipe.transforms.rotation != "off" or any(choice.form is not None for choice in job.choices)


def block_elements(job: Job) -> int:
    """Weights of the linears of one block."""
    return sum(spec.outputs * spec.inputs for spec in block_specs(job))


def block_specs(job: Job) -> list[LinearSpec]:
    """The linears of one block."""
    return [record.spec for record in job.records.values() if record.spec.block == 0]


def row_bytes(job: Job) -> int:
    """Token rows in float32."""
    return job.model.config.vocab * job.model.config.hidden * 4
