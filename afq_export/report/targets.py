"""What a target accepts and needs, in words, and whether that is on this machine."""

from __future__ import annotations

from afq_export.extras import missing_here, part
from afq_export.spec.strict import Data
from afq_export.spec.target import Kernel, TargetProfile


class TargetLine(Data):
    """One target for `targets list`: `missing` is what is not on this machine, of what it `needs`."""

    name: str
    status: str
    runtime: str
    backend: str
    default_recipe: str
    description: str
    accepts: tuple[str, ...]
    needs: tuple[str, ...]
    missing: tuple[str, ...]


def target_line(target: TargetProfile) -> TargetLine:
    """The line of `target`, looked up on this machine."""
    return TargetLine(
        name=target.name,
        status=target.status,
        runtime=target.runtime,
        backend=target.backend,
        default_recipe=target.default_recipe,
        description=target.description,
        accepts=tuple(dict.fromkeys(short(kernel) for kernel in target.kernels)),
        needs=needs(target),
        missing=tuple(missing_here(target)),
    )


def needs(target: TargetProfile) -> tuple[str, ...]:
    """Modules, with the extra that brings them where it is not part of afq-export itself, and a vendor's kit."""
    tools = [f"{tool} [{known.extra}]" if (known := part(tool)) else tool for tool in target.tools]
    return tuple(tools + ([f"{target.sdk.name} {target.sdk.version}"] if target.sdk else []))


def short(kernel: Kernel) -> str:
    """A kernel in one word: `w4-8 g32+ a8 dynamic`."""
    low, high = min(kernel.weight_bits), max(kernel.weight_bits)
    bits = str(low) if low == high else f"{low}-{high}"
    grid = {"per_channel": "row", "per_tensor": "tensor", "per_group": "group"}[kernel.granularity.value]
    activation = "float" if kernel.activation == "none" else f"a{kernel.activation_bits} {kernel.activation}"
    return f"w{bits} {grid} {activation}"


def long(kernel: Kernel) -> str:
    """A kernel in a line of the table of targets."""
    bits = ", ".join(map(str, kernel.weight_bits))
    inputs = "float" if kernel.activation == "none" else f"{kernel.activation} int{kernel.activation_bits}"
    sizes = f" ({', '.join(map(str, kernel.groups))})" if kernel.groups else ""
    return f"`{kernel.name}`: {kernel.granularity.value}{sizes} weights of {bits} bits, {inputs} activations"
