"""A target says what one device's kernels accept and how exactly they compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from afq_export.spec.online import Online
from afq_export.spec.quant import Granularity, LinearSpec, ScaleType
from afq_export.spec.strict import Data


class Kernel(Data):
    """One integer linear kernel of the runtime: what it accepts, and the arithmetic it promises.

    `stored_bits` is what a code occupies in the file. `symmetric` weights have zero point 0. `group_multiple_of`,
    `groups` (all sizes there are), `inputs_multiple_of`, `inputs_at_least`, `outputs_multiple_of` and `takes_bias` are
    hard limits of the kernel; with `ragged_groups` the last group may be short. `scale_type` is what it keeps scales
    in. `arithmetic` is `module.function` of the integer model in afq_export/validate/integer. `max_relative_error` 0
    means bit for bit (`==`); otherwise it is the bound on |kernel - model| over the largest |output|, and `reason` says
    why it is not 0. `max_steps` is such a bound too, in steps of the grid that the output is left on.
    `perplexity_budget` and `agreement_floor` are the target's for programs with this kernel, where its steps decide
    more tokens; 0: no others.

    `activation_granularity` and `activation_symmetric` are the grid that a dynamic kernel puts its input on (a group is
    `activation_group` inputs, or the weight's group where that is 0); `output` is `static` when it leaves its result on
    a stored grid. `scale_group`: the operator has groups only, and a row's scale is in the file for each of that many
    inputs. `runs_as` is the operator that the runtime's profile must show, `session` the session options that it
    needs, `opset` the least ONNX opset that has its types. `stated_by` is the vendor's page that says so, where nothing
    here can; empty: a test of this package exercises the kernel.
    """

    name: str
    arithmetic: Literal[
        "xnnpack.dynamic_per_channel",
        "xnnpack.dynamic_per_group",
        "xnnpack.static_per_channel",
        "onnxruntime.static_to_float",
        "onnxruntime.static_requantized",
        "onnxruntime.dynamic_per_token",
        "onnxruntime.dynamic_per_block",
        "onnxruntime.weight_only",
        "qnn.static",
        "openvino.dynamic_per_group",
        "openvino.weight_only",
        "coreml.weight_only",
        "vulkan.weight_only",
        "vulkan.dynamic_per_group",
        "tosa.static",
        "cmsis_nn.static_per_channel",
        "cmsis_nn.rows",
        "unknown",
    ]
    weight_bits: tuple[int, ...]
    stored_bits: int
    granularity: Granularity
    activation: Literal["dynamic", "static", "none"]
    activation_bits: int = 8
    activation_granularity: Granularity = Granularity.PER_TOKEN
    activation_group: int = 0
    activation_symmetric: bool = False
    output: Literal["float", "static"] = "float"
    scale_group: int = 0
    group_multiple_of: int = 1
    groups: tuple[int, ...] = ()
    ragged_groups: bool = False
    inputs_multiple_of: int = 1
    inputs_at_least: int = 1
    outputs_multiple_of: int = 1
    takes_bias: bool = True
    scale_type: ScaleType = ScaleType.FLOAT32
    runs_as: str = ""
    session: dict[str, str] = {}
    opset: int = 0
    max_relative_error: float = 0.0
    max_steps: float = 0.0
    perplexity_budget: float = 0.0
    agreement_floor: float = 0.0
    reason: str = ""
    stated_by: str = ""

    def refusal(self, spec: LinearSpec) -> str:
        """Why this kernel does not run `spec`; empty when it does."""
        weight, mode = spec.weight, activation_mode(spec)
        if weight.bits not in self.weight_bits:
            return f"{self.name} takes {_join(self.weight_bits)}-bit weights, not {weight.bits}"
        if mode != self.activation:
            return f"{self.name} takes {self.activation} activations, not {mode}"
        if spec.activation is not None and spec.activation.bits != self.activation_bits:
            return f"{self.name} takes {self.activation_bits}-bit activations, not {spec.activation.bits}"
        if spec.output not in ("any", self.output):
            return f"{self.name} leaves its output {self.output}, not {spec.output}"
        if weight.granularity is not self.granularity:
            return f"{self.name} takes {self.granularity.value} weights, not {weight.granularity.value}"
        if not weight.symmetric:
            return f"{self.name} takes symmetric weights only: the runtime ignores a weight zero point silently"
        if self.granularity is Granularity.PER_GROUP and weight.group % self.group_multiple_of:
            return f"{self.name} takes groups that are a multiple of {self.group_multiple_of}, not {weight.group}"
        if self.groups and self.granularity is Granularity.PER_GROUP and weight.group not in self.groups:
            return f"{self.name} takes groups of {_join(self.groups)}, not {weight.group}"
        if self.granularity is Granularity.PER_GROUP and spec.inputs % weight.group and not self.ragged_groups:
            return f"{self.name} takes whole groups only: {spec.inputs} inputs are not a multiple of {weight.group}"
        if spec.bias and not self.takes_bias:
            return f"{self.name} takes no bias"
        if spec.outputs % self.outputs_multiple_of:
            return f"{self.name} takes a multiple of {self.outputs_multiple_of} outputs, not {spec.outputs}"
        if spec.inputs % self.inputs_multiple_of:
            return f"{self.name} takes a multiple of {self.inputs_multiple_of} inputs, not {spec.inputs}"
        if spec.inputs < self.inputs_at_least:
            return f"{self.name} takes {self.inputs_at_least} inputs or more, not {spec.inputs}"
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


class OnnxOptions(Data):
    """How the ONNX file is written and run.

    `session` are options that may change the arithmetic: `graph_optimization_level` (disable, basic, extended, all)
    and configuration entries of ONNX Runtime. `providers` are the execution providers, in order; one that is not there
    is refused. `explicit_zero_points` writes weight zero points of 0 into the file. `ort_format` adds model.ort and
    the list of operators that a minimal build needs. Tensors of more than `external_data_mb` together go to
    model.onnx.data. A program of more than `vectors_mb` gets no test vectors: the runtime, which has two more copies of
    it while it loads, is then left to `validate`.
    """

    opset: int = 23
    ir_version: int = 11
    external_data_mb: Annotated[int, Meta(ge=0)] = 1024
    vectors_mb: Annotated[int, Meta(ge=0)] = 2048
    explicit_zero_points: bool = False
    ort_format: bool = False
    providers: Annotated[tuple[str, ...], Meta(min_length=1)] = ("CPUExecutionProvider",)
    session: dict[str, str] = {}


class OpenvinoOptions(Data):
    """How OpenVINO runs the program: `device`, and `properties` that may change the arithmetic, as it names them.

    Both go into the bundle, the properties also into the program, where plugins look for them.
    """

    device: str = "CPU"
    properties: dict[str, str] = {}


class CoremlOptions(Data):
    """What a Core ML program needs: the least system version, as coremltools names it (states and int4 need iOS18)."""

    deployment_target: Literal["iOS18", "iOS26"] = "iOS18"


class Trap(Data):
    """Weights of `weight_bits` that the runtime would take and compute otherwise than asked, and how."""

    weight_bits: tuple[int, ...]
    reason: str


class Sdk(Data):
    """A vendor's kit that lowering needs and no package registry has.

    `module` is the Python module that it brings, `variable` what names its folder; either is enough to have it.
    `licence` is whose terms hold for what it makes.
    """

    name: str
    version: str
    get: str
    module: str = ""
    variable: str = ""
    licence: str = ""


class QnnOptions(Data):
    """How Qualcomm's HTP runs the graphs: `htp_arch` and `soc_model` as the QNN SDK numbers them, which the compiled
    context is for; `provider` are further options of the QNN execution provider. `operator_steps`: how far an
    operator's result may be from what the file says, in steps of its grid, by bits of the program's activations and
    kind of operator (validate/qnn.py); 0 for the others."""

    htp_arch: int
    soc_model: int
    opset: int = 23
    ir_version: int = 11
    provider: dict[str, str] = {}
    operator_steps: dict[str, dict[str, int]] = {}

    def steps(self, bits: int) -> dict[str, int]:
        """`operator_steps` of programs with activations of `bits` bits."""
        return self.operator_steps.get(str(bits), {})


class CortexMOptions(Data):
    """Memory of the board that a program may take; what does not fit is refused before any work.

    `sram_kb` holds activations, the cache's tensors and lm_head's widened rows during a call, `flash_kb` the program.
    """

    sram_kb: Annotated[int, Meta(ge=1)]
    flash_kb: Annotated[int, Meta(ge=1)]
    decode: bool = True


class EthosUOptions(Data):
    """The NPU and the system around it: names of Vela's configuration, and the memory that a program may take.

    `sram_kb` holds activations and the cache's tensors while a call runs, `flash_kb` weights, token rows and tables;
    what does not fit is refused before any work. `decode` adds a method that takes one token: its own command stream,
    with the weights once more.
    """

    accelerator: str
    system_config: str
    memory_mode: str
    sram_kb: Annotated[int, Meta(ge=1)]
    flash_kb: Annotated[int, Meta(ge=1)]
    decode: bool = True


BackendName = Literal[
    "xnnpack", "onnxruntime", "qnn", "ethos-u", "cortex-m", "coreml", "vulkan", "openvino", "vendor-sdk"
]
"""The modules of afq_export/backends."""


class TargetProfile(Data):
    """One deployment target, as its TOML states it. `tools` are Python modules that lowering and running need.

    `verified`: its programs run here, in the vendor's runtime, simulator or reference model. `compiles`: the vendor's
    compiler takes them and nothing here runs them. `untested`: written from the vendor's documentation.
    """

    name: str
    description: str
    status: Literal["verified", "compiles", "untested"]
    runtime: Literal["executorch", "onnxruntime", "openvino"]
    backend: BackendName
    default_recipe: str
    shapes: Shapes
    kernels: tuple[Kernel, ...]
    onnx: OnnxOptions | None = None
    """What an `onnxruntime` target needs besides; None for the others."""
    openvino: OpenvinoOptions | None = None
    """The same for an `openvino` target."""
    coreml: CoremlOptions | None = None
    """The same for a `coreml` target."""
    sdk: Sdk | None = None
    """What a `vendor-sdk` target waits for."""
    sources: tuple[str, ...] = ()
    """Pages of the vendor that state what no test here exercises: `title, address`."""
    qnn: QnnOptions | None = None
    """What a target of the backend `qnn` needs besides; None for the others."""
    cortex_m: CortexMOptions | None = None
    """What a target of the backend `cortex-m` needs besides."""
    ethos_u: EthosUOptions | None = None
    """What a target of the backend `ethos-u` needs besides."""
    static_graph: bool = False
    """Programs hold no float tensor: calibration gives every tensor a stored grid, lm_head's input too."""
    elementwise_bits: Literal[0, 16] = 0
    """Bits of a static graph's tensors that no matrix product takes; 0: those of the others."""
    embedding_bits: tuple[int, ...] = (8, 32)
    kv_cache_bits: tuple[int, ...] = (32,)
    """Of the keys and values that the cache holds; 32 is what the program computes them in."""
    online: tuple[Online, ...] = ()
    """What a recipe may leave in the program (`transforms.online`)."""
    tools: tuple[str, ...] = ()
    float_ops: tuple[str, ...] = ()
    perplexity_budget: float = 0.02
    """The exported file's perplexity may exceed the integer reference's by this fraction at most."""
    reference_budget: float = 0.01
    """The integer reference's perplexity may differ from fake quantization's by this fraction at most."""
    agreement_floor: float = 0.995
    """Least share of teacher-forced tokens at which the exported file and the integer reference agree."""
    traps: tuple[str, ...] = ()
    refused: tuple[Trap, ...] = ()
    """Weights that are refused with their own reason, whatever the kernels say."""

    @property
    def session(self) -> dict[str, str]:
        """Options of the runtime's session that all kernels share."""
        if self.onnx is not None:
            return self.onnx.session
        return self.openvino.properties if self.openvino is not None else {}

    def supports(self, spec: LinearSpec) -> Yes | No:
        """The first kernel that runs `spec`, or why none does."""
        trap = next((trap for trap in self.refused if spec.weight.bits in trap.weight_bits), None)
        if trap is not None:
            return No(trap.reason)
        reasons = []
        for kernel in self.kernels:
            reason = kernel.refusal(spec)
            if not reason:
                return Yes(kernel)
            reasons.append(reason)
        near = [r for r, k in zip(reasons, self.kernels, strict=True) if spec.weight.bits in k.weight_bits]
        return No("; ".join(near or reasons))

    def bounded(self, kernels: Collection[str]) -> TargetProfile:
        """This target with the bounds that hold for programs with `kernels`."""
        used = [self.kernel(name) for name in kernels]
        return msgspec.structs.replace(
            self,
            perplexity_budget=max([self.perplexity_budget, *(kernel.perplexity_budget for kernel in used)]),
            agreement_floor=min([self.agreement_floor, *(k.agreement_floor for k in used if k.agreement_floor)]),
        )

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
