"""`afq-export plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afq_export.commands.options import Json, takes_request
from afq_export.spec.request import Request
from afq_export.terminal import duration, emit

if TYPE_CHECKING:
    from afq_export.plan import Plan


@takes_request
def command(request: Request, as_json: Json = False) -> None:
    """What `run` with the same options would do: transforms, kernels, size, memory and time. Does none of it."""
    from afq_export.commands.stages import say_defaults, say_status
    from afq_export.files import refuse_unwritable
    from afq_export.job import resolve
    from afq_export.machine import measured_speed, settle
    from afq_export.plan import plan

    job = resolve(request, lowers=False)
    refuse_unwritable(job.out / "run.json")
    say_defaults(job)
    say_status(job)
    settle(job.threads)
    made = plan(job, measured_speed())
    emit(_text(made), made, as_json)


def _text(plan: Plan) -> str:
    from afq_export.report.layers import groups_text
    from afq_export.report.tables import cache_line, online_lines, site_reasons, sites_table, size_mb

    size, memory, time = plan.size, plan.memory, plan.time
    parts = f"blocks {size_mb(size.linears)}, head {size_mb(size.head)}, embedding {size_mb(size.embedding)}"
    facts = {
        "model": f"{plan.model}, {plan.parameters:,} parameters, {plan.blocks} blocks of width {plan.hidden}",
        "recipe": plan.recipe,
        "target": plan.target,
        "calibration": plan.calibration,
        "evaluation": plan.evaluation,
        "embedding": plan.embedding,
        **({"KV cache": cache_line(plan.kv_cache)} if plan.kv_cache else {}),
        "rotation": plan.rotation,
        "rounding": plan.rounding,
        "end to end": plan.end_to_end,
        "run folder": plan.out,
    }
    estimates = {
        plan.file: f"{size_mb(size.total)} ({parts})",
        "memory": f"about {memory.calibrate:.0f} MB to calibrate, {memory.quantize:.0f} to quantize, "
        f"{memory.lower:.0f} to lower, {memory.validate:.0f} to validate",
        "activations": f"{memory.activations:.0f} MB in "
        f"{'files of the run folder' if memory.spilled else 'memory'} (--activation-memory-mb)",
        "time": f"about {duration(time.calibrate)} to calibrate, {duration(time.quantize)} to quantize, "
        f"{duration(time.lower)} to lower, {duration(time.validate)} to validate, "
        f"at the {time.gflops.float32:.0f} GFLOP/s measured just now ({time.gflops.bfloat16:.0f} in bfloat16)",
    }
    folds = "\n".join([sites_table(plan.sites).text(), "", *site_reasons(plan.sites), *online_lines(plan.online)])
    sections = (_aligned(facts), folds, groups_text(plan.layers), "Estimates:", _aligned(estimates))
    return "\n\n".join(sections)


def _aligned(pairs: dict[str, str]) -> str:
    width = max(map(len, pairs))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs.items())
