"""report.json and manifest.json: a stable interface.

Fields may be added; a field that changes its meaning or goes away raises `SCHEMA_VERSION`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from afq_export.spec.cache import Cache
from afq_export.spec.history import History, Tuning
from afq_export.spec.online import OnlineCost
from afq_export.spec.strict import Data

SCHEMA_VERSION = 1

RUNGS = ("float", "folded", "fake_quant", "integer", "runtime")
"""The ladder, from the model as it came to the exported file in its real runtime."""

Status = Literal["passed", "failed", "skipped"]


class Check(Data):
    """One thing that was to be shown. `skipped` never counts as passed; `detail` holds the figures or the reason."""

    name: str
    status: Status
    detail: str


class Perplexity(Data):
    """exp of the mean negative log-likelihood of `tokens` predictions, and its standard error."""

    value: float
    stderr: float
    tokens: int


class Perplexities(Data):
    """Per rung, null where the rung did not run (a check says why)."""

    float_: Perplexity | None = msgspec.field(name="float", default=None)
    folded: Perplexity | None = None
    fake_quant: Perplexity | None = None
    integer: Perplexity | None = None
    runtime: Perplexity | None = None

    def items(self) -> list[tuple[str, Perplexity | None]]:
        """Rung and figure, in the order of the ladder."""
        return list(zip(RUNGS, (self.float_, self.folded, self.fake_quant, self.integer, self.runtime), strict=True))


class Protocol(Data):
    """What makes two perplexities comparable: text, tokenizer and how the windows were cut."""

    corpus: str
    digest: str
    tokenizer_digest: str
    window: int
    stride: int
    bos: bool
    windows: int
    windows_in_corpus: int


class Agreement(Data):
    """Teacher-forced agreement of a rung with its reference: share of equal argmaxes, mean KL(reference || rung)."""

    top1: float
    kl: float
    tokens: int


class Disagreement(Data):
    """A token at which file and integer reference choose differently, and why.

    `margin` is the reference's logit gap between the two choices over its largest |logit|. `flipped_step` names the
    first linear in whose input an int8 code depends on the last float32 bits.
    """

    window: int
    position: int
    reference: int
    runtime: int
    margin: float
    reason: Literal["near_tie", "flipped_step", "unexplained"]
    layer: str | None = None


class AgreementReport(Data):
    """The exported file against the integer reference, and every rung against the float model.

    `float_operators`: whose float32 operators stand between the integer models of the reference, the runtime's own
    (run alone) or torch's. `bit_for_bit`: share of tokens all of whose logits are equal to the last bit.
    """

    top1: float | None
    kl: float | None
    against_float: dict[str, Agreement]
    disagreements: tuple[Disagreement, ...] = ()
    float_operators: str = "torch"
    bit_for_bit: float | None = None


class FoldReport(Data):
    """max |difference of logits| / max |logit| of folded against float, by the dtype of the computation."""

    max_relative_error_float64: float | None
    max_relative_error_float32: float | None
    first_block: str | None = None


class LayerReport(Data):
    """One linear alone in the real runtime, on real activations, against the integer model.

    `exact`: equal bit for bit. `max_steps`: largest difference in output steps (static: codes of the output grid;
    dynamic: units of the int32 accumulator). `max_relative_error`: over the largest |output|. `sqnr_db`: the float
    layer's output power over that of the quantization error. Null: could not be measured.
    """

    name: str
    kernel: str
    passed: bool | None
    exact: bool | None
    max_steps: float | None
    max_relative_error: float | None
    sqnr_db: float | None
    note: str = ""


class Lowered(Data):
    """A linear and the kernel that runs it."""

    name: str
    kernel: str


class Refused(Data):
    """What the backend did not take, how often, and why."""

    what: str
    count: int
    reason: str


class NpuLayer(Data):
    """A layer as an NPU's compiler estimates it. An operator that it fuses counts with the one that it is fused to."""

    name: str
    cycles: int
    macs: int
    sram_bytes: int


class NpuEstimate(Data, kw_only=True):
    """What an NPU's compiler says a call will take; nothing here executes the command stream.

    `tokens` are those that the call takes. `operators` after fusing; `outside`: what does not run on the NPU, and how
    often. `layers` in running order.
    """

    compiler: str
    tokens: int
    accelerator: str
    system_config: str
    memory_mode: str
    clock_hz: float
    cycles: int
    seconds: float
    macs: int
    sram_bytes: int
    dram_bytes: int
    flash_bytes: int
    operators: int
    outside: dict[str, int] = {}
    layers: tuple[NpuLayer, ...] = ()


class Coverage(Data):
    """What was lowered to which kernel, what stays outside, and an NPU compiler's estimates where there are some."""

    lowered: tuple[Lowered, ...] = ()
    refused: tuple[Refused, ...] = ()
    estimates: tuple[NpuEstimate, ...] = ()


class Cost(Data):
    """What the run took over all its attempts; null when a stage's cost is not known."""

    calibrate_s: float | None = None
    export_s: float | None = None
    peak_rss_mb: float | None = None


class Site(Data):
    """One fold site of every block. `form` null: no transform, `reason` says why; `refused`: form -> why not here."""

    name: str
    kind: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    asked: str
    form: str | None
    shift: bool
    reason: str
    refused: dict[str, str]


class Size(Data):
    """Bytes of the program, by what they hold."""

    linears: int
    head: int
    embedding: int
    rest: int

    @property
    def total(self) -> int:
        return self.linears + self.head + self.embedding + self.rest


class Artifact(Data):
    """The exported file."""

    bytes: int
    sha256: str
    name: str = "model.pte"


class Model(Data):
    """The source model. `digest` is the sha256 of its weights."""

    name: str
    digest: str
    type: str
    parameters: int | None = None


class DeviceReport(Data, kw_only=True):
    """The exported file on one device against the same file in the same runtime on this machine, teacher-forced.

    `family` and `instructions`: the kernels that ran, and the distinct instructions that tell (arm64/instructions.py).
    `operators`: executed node types and how many of each, where the runtime profiles them. `linears`: how many were
    run alone on the same inputs, `exact_linears` of them gave the same bits, `linear_error` is the largest difference
    over the largest |output|, of `worst_linear`. `bit_for_bit`: share of tokens all of whose logits are equal.
    `max_relative_error`: largest difference over the largest |logit|. `here` and `there`: the two perplexities,
    `excess_stderr` the standard error of their ratio. `own_top1`, `own_max_relative_error`: this machine against
    itself, windows cut into other calls: what float rounding alone does. `seconds`: per window on the device; under
    emulation they say nothing of its speed. 1e300 stands for what is no number. `first_other`: window and token of the
    first logits that are not equal.
    """

    device: str
    runtime: str
    emulator: str | None
    family: str
    instructions: dict[str, int]
    operators: dict[str, int]
    linears: int
    exact_linears: int
    worst_linear: str | None
    linear_error: float
    windows: int
    window: int
    bit_for_bit: float
    max_relative_error: float
    top1: float
    own_top1: float
    own_max_relative_error: float
    excess_stderr: float
    here: Perplexity
    there: Perplexity
    seconds: tuple[float, ...]
    note: str = ""
    processor: str = ""
    first_other: tuple[int, int] | None = None
    folder: str = ""
    """What was left there on request."""


class ValidationReport(Data, kw_only=True):
    """report.json. `verdict` is `pass` only when no check failed and none that the verdict needs was skipped.

    `compiled` is the same for a target whose programs nothing here runs: the file was made and read back, not measured.
    """

    schema_version: int = SCHEMA_VERSION
    verdict: Literal["pass", "compiled", "fail"]
    model: Model
    recipe: str
    target: str
    protocol: Protocol
    perplexity: Perplexities
    agreement: AgreementReport
    fold: FoldReport
    layers: tuple[LayerReport, ...]
    first_departure: str | None
    coverage: Coverage
    cost: Cost
    artifact: Artifact | None
    checks: tuple[Check, ...]
    size: Size | None = None
    """Of the exported file; what it holds besides rows and linears is the rest of its bytes."""
    sites: tuple[Site, ...] = ()
    """What was folded where, the same in every block."""
    online: tuple[OnlineCost, ...] = ()
    """What was not folded but stays in the program, because the recipe says so."""
    calibration: tuple[History, ...] = ()
    """Per block, in order; empty when the calibration is not at hand."""
    tuning: Tuning | None = None
    """What came after the blocks; null when nothing did."""
    devices: tuple[DeviceReport, ...] = ()
    """Devices that `validate --device` named."""
    kv_cache: Cache | None = None
    """Null where the target does not state what the cache holds."""


class Origin(Data):
    """What a model says of itself: licence (SPDX where it is one) and the model that it was made from; else empty."""

    licence: str = ""
    base_model: str = ""


UNKNOWN = Origin()
"""That of a model that says nothing."""


class ManifestModel(Data):
    """Name and weights' digest of the source model."""

    name: str
    digest: str
    origin: Origin = UNKNOWN


class Manifest(Data, kw_only=True):
    """manifest.json: the sha256 of every other file of the bundle, and what it was made from and by.

    `program` is the file that `runtime` runs, made by `backend` (all empty in bundles of afq-export 0.1).
    """

    schema_version: int = SCHEMA_VERSION
    files: dict[str, str]
    model: ManifestModel
    recipe: str
    target: str
    runtime: str = ""
    backend: str = ""
    program: str = ""
    versions: dict[str, str]
    seed: int
    command: tuple[str, ...]
    kv_cache: Cache | None = None


def to_json(report: ValidationReport | Manifest) -> str:
    """Readable JSON, the same bytes for the same report: fields in the order of the struct, final newline."""
    encoded = msgspec.json.encode(report, order="deterministic")
    return msgspec.json.format(encoded, indent=1).decode() + "\n"


def read_report(data: bytes) -> ValidationReport:
    """Inverse of `to_json` for a report. Raises msgspec.DecodeError when it does not fit."""
    return msgspec.json.decode(data, type=ValidationReport)
