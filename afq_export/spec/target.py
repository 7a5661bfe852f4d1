"""A target says what one device's kernels accept and how exactly they compute."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from msgspec import Meta

from afq_export.spec.quant import Granularity, LinearSpec, ScaleType
from afq_export.spec.strict import Data


class Kernel(Data):
    """One integer linear kernel of the runtime: what it accepts, and the arithmetic it promises.

    `stored_bits` is what a code occupies in the file. `symmetric` weights have zero point 0. `group_multiple_of` and
    `inputs_multiple_of` are hard limits of the kernel; `scale_type` is what it keeps scales in. `arithmetic` names the
    integer model in afq_export/validate/integer. `max_relative_error` 0 means bit for bit (`==`); otherwise it
    is the bound on |kernel - model| over the largest |output|, and `reason` says why it is not zero.
    """

    name: str
    arithmetic: Literal["dynamic_per_channel", "dynamic_per_group", "static_per_channel"]
    weight_bits: tuple[int, ...]
    stored_bits: int
    granularity: Granularity
    activation: Literal["dynamic", "static", "none"]
    activation_bits: int = 8
    group_multiple_of: int = 1
    inputs_multiple_of: int = 1
    scale_type: ScaleType = ScaleType.FLOAT32
    max_relative_error: float = 0.0
    reason: str = ""

    def refusal(self, spec: LinearSpec) -> str:
        """Why this kernel does not run `spec`; empty when it does."""
        weight, mode = spec.weight, activation_mode(spec)
        if weight.bits not in self.weight_bits:
            return f"{self.name} takes {_join(self.weight_bits)}-bit weights, not {weight.bits}"
        if mode != self.activation:
            return f"{self.name} takes {self.activation} activations, not {mode}"
        if spec.activation is not None and spec.activation.bits != self.activation_bits:
            return f"{self.name} takes {self.activation_bits}-bit activations, not {spec.activation.bits}"
        if weight.granularity is not self.granularity:
            return f"{self.name} takes {self.granularity.value} weights, not {weight.granularity.value}"
        if not weight.symmetric:
            return f"{self.name} takes symmetric weights only: the runtime ignores a weight zero point silently"
        if self.granularity is Granularity.PER_GROUP and weight.group % self.group_multiple_of:
            return f"{self.name} takes groups that are a multiple of {self.group_multiple_of}, not {weight.group}"
        if self.granularity is Granularity.PER_GROUP and spec.inputs % weight.group:
            return f"{self.name} takes whole groups only: {spec.inputs} inputs are not a multiple of {weight.group}"
        if spec.inputs % self.inputs_multiple_of:
            return f"{self.name} takes a multiple of {self.inputs_multiple_of} inputs, not {spec.inputs}"
        return ""


@dataclasses.dataclass(frozen=True)
class Yes:
    """The target runs the linear with this kernel."""

    kernel: Kernel


@dataclasses.dataclass(frozen=True)
class No:
    """The target has no kernel for the linear, and why: one reason per kernel that comes near."""

    reason: str


class Shapes(Data):
    """Limits of the exported program: KV cache length, and tokens a prefill call takes at most."""

    context: Annotated[int, Meta(ge=2)]
    prefill: Annotated[int, Meta(ge=2)]


class TargetProfile(Data):
    """One deployment target, as its TOML states it. `tools` are Python modules that lowering and running need."""

    name: str
    description: str
    status: Literal["verified", "compiles", "untested"]
    runtime: Literal["executorch"]
    backend: str
    default_recipe: str
    shapes: Shapes
    kernels: tuple[Kernel, ...]
    embedding_bits: tuple[int, ...] = (8, 32)
    tools: tuple[str, ...] = ()
    float_ops: tuple[str, ...] = ()
    perplexity_budget: float = 0.02
    """The exported file's perplexity may exceed the integer reference's by this fraction at most."""
    reference_budget: float = 0.01
    """The integer reference's perplexity may differ from fake quantization's by this fraction at most."""
    agreement_floor: float = 0.995
    """Least share of teacher-forced tokens at which the exported file and the integer reference agree."""
    traps: tuple[str, ...] = ()

    def supports(self, spec: LinearSpec) -> Yes | No:
        """The first kernel that runs `spec`, or why none does."""
        reasons = []
        for kernel in self.kernels:
            reason = kernel.refusal(spec)
            if not reason:
                return Yes(kernel)
            reasons.append(reason)
        near = [r for r, k in zip(reasons, self.kernels, strict=True) if spec.weight.bits in k.weight_bits]
        return No("; ".join(near or reasons))

    def kernel(self, name: str) -> Kernel:
        """The kernel called `name`. Raises KeyError when the target has none."""
        return {kernel.name: kernel for kernel in self.kernels}[name]


def activation_mode(spec: LinearSpec) -> str:
    """`dynamic`, `static` or `none`."""
    if spec.activation is None:
        return "none"
    return "dynamic" if spec.activation.dynamic else "static"


def _join(bits: tuple[int, ...]) -> str:
    return "/".join(map(str, bits))
