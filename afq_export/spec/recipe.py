"""A recipe says how to quantize: a scheme (bits and grids) and a method (transforms and how they are learned).

On the command line `w4a8-g32` is a scheme with its default method, `w4a8-g32+omniquant` names both, and a path is a
TOML file of this form; it may start from shipped ones with `scheme = "..."` and `method = "..."` and change any field.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from afq_export.spec.online import Online
from afq_export.spec.strict import Data

Bits = Annotated[int, Meta(ge=2, le=8)]
Count = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(gt=0, le=1)]


class Weights(Data):
    """Grid of the block linears' weights: `bits`, and `group` input features a scale (0: one scale per row)."""

    bits: Bits
    group: Annotated[int, Meta(ge=0)] = 0
    symmetric: bool = True


class Activations(Data):
    """Grid of the linears' inputs: `dynamic` as the kernel does it at run time, `static` per tensor from calibration,
    or `none` (float). `output`: whether a static linear's result is put on a stored grid too; `any` takes the first
    kernel that the target has."""

    mode: Literal["dynamic", "static", "none"] = "dynamic"
    bits: Annotated[int, Meta(ge=2, le=16)] = 8
    output: Literal["any", "float", "static"] = "any"


class Embedding(Data):
    """Token embedding rows: 2, 4 or 8 bits with one scale per row (`group` 0) or per `group` columns; 32 is float."""

    bits: Literal[2, 4, 8, 32] = 8
    group: Annotated[int, Meta(ge=0)] = 0


Autocast = Literal["float32", "bfloat16"]
"""Precision of the matmuls while something is learned or rounded."""


class KvCache(Data):
    """What the KV cache holds: float keys and values (`bits` 32), or codes of 8 or 4 bits on a grid of their own for
    every token and head (`group` 0), or for every `group` of its numbers; nothing of it is calibrated."""

    bits: Literal[4, 8, 32] = 32
    group: Annotated[int, Meta(ge=0)] = 0

    @property
    def quantized(self) -> bool:
        """Whether it holds codes."""
        return self.bits < 32


FLOAT_CACHE = KvCache()


class Override(Data):
    """Other bits, groups or activations for the linears whose name matches `pattern` (shell style:
    `blocks.*.down_proj`)."""

    pattern: str
    bits: Bits | None = None
    group: Annotated[int, Meta(ge=0)] | None = None
    activations: Literal["dynamic", "static", "none"] | None = None


class Transforms(Data):
    """Which form of transform each fold site gets; `off` leaves the site alone.

    `affine` is a full matrix per head (tied over the query heads of a KV head); where only a scaled rotation per RoPE
    pair commutes it is that; where no matrix folds exactly it is refused with the reason (see arch/*.fold_sites).
    `rotation` turns the residual stream, and the heads between v and o, first: by fixed random Hadamard matrices, or by
    those that `rotation_steps` steps make of them, one block a step (`learned`: calibrate/rotation.py).
    `online` operations stay in the program and cost time: `down_hadamard` multiplies the input of the MLP's last linear
    by Hadamard matrices of at most `online_block`, `norm_matrix` makes `norm_to_linears = "affine"` possible: the
    inverse of the whole matrix stays behind the norm (fold/online.py). `shift` learns a shift where one folds. `start`
    is the diagonal's first value: ones, SmoothQuant's `act^p / weight^(1-p)` with p = `power`, or `search`: AWQ's grid
    over p with the least block error.
    """

    rotation: Literal["off", "hadamard", "learned"] = "off"
    rotation_steps: Count = 360
    online: tuple[Online, ...] = ()
    online_block: Literal[2, 4, 8, 16, 32, 64, 128, 256, 512] = 64
    norm_to_linears: Literal["off", "diagonal", "affine"] = "off"
    v_to_o: Literal["off", "diagonal", "affine", "permutation"] = "off"
    q_to_k: Literal["off", "diagonal", "affine"] = "off"
    up_to_down: Literal["off", "diagonal", "affine", "permutation"] = "off"
    shift: bool = False
    start: Literal["ones", "smoothquant", "search"] = "ones"
    power: Annotated[float, Meta(ge=0, le=1)] = 0.5


class Learning(Data):
    """How transforms and clipping are learned, block by block (AffineQuant, arXiv 2403.12544, section 3).

    `epochs` 0: nothing is learned, the start values stand. `batch` is windows a step. `stability_factor` is alpha of
    the gradual mask: it damps all off-diagonal entries. `clipping` shrinks the weight ranges: `search` takes the factor
    with the least error weighted by the inputs' energy, `learn` starts there and learns it with the transforms (LWC).
    `augmented_loss` adds the distance to the float block on the quantized path's own input. `schedule` is the course of
    the learning rates. `loss` is the paper's `mse`, or `balanced` with every token's own relative error. `autocast` is
    the precision of the matmuls while learning; results are always measured in float32. `held_out` windows (at most a
    quarter of all) are only measured on: the best epoch is chosen by them, and `patience` epochs without a better one
    end the learning (0: never).
    """

    epochs: Annotated[int, Meta(ge=0)] = 0
    batch: Count = 4
    learning_rate: NonNegative = 2e-2
    clipping_rate: NonNegative = 1e-1
    weight_decay: NonNegative = 0.0
    stability_factor: Annotated[float, Meta(ge=0, le=1)] = 0.1
    clipping: Literal["off", "search", "learn"] = "learn"
    augmented_loss: bool = True
    schedule: Literal["constant", "cosine"] = "cosine"
    loss: Literal["balanced", "mse"] = "balanced"
    autocast: Autocast = "float32"
    held_out: Annotated[int, Meta(ge=0)] = 0
    patience: Annotated[int, Meta(ge=0)] = 0


class Rounding(Data):
    """How the blocks' folded weights are rounded to their grids, after the transforms are learned; lm_head and token
    rows go to the nearest code.

    `nearest`; `gptq` (arXiv 2210.17323), on `batch` windows at a time, with `asymmetric` towards what the float path's
    linears give, so that earlier errors are made good too (GPTAQ, arXiv 2504.02692); `learned` (SignRound, arXiv
    2309.05516): `steps` of signed gradient descent on `batch` windows each, `rate` of a grid step at first and falling
    to 0. `autocast` is the precision of the matmuls.
    """

    method: Literal["nearest", "gptq", "learned"] = "nearest"
    asymmetric: bool = True
    steps: Count = 120
    batch: Count = 4
    rate: NonNegative = 0.01
    autocast: Autocast = "float32"


class EndToEnd(Data):
    """After the blocks: scales and norms' gains of the whole quantized model, learned so that its next-token
    distributions are the float model's (EfficientQAT, arXiv 2407.11062, E2E-QP; the float model is the teacher).

    `steps` 0: nothing. A step takes `batch` of `windows` windows, evenly spaced over the calibration text (0: those
    that the blocks were calibrated on). `scale_rate` is relative to each scale, `code_rate` in steps of the grid (0:
    codes stand); rates rise in the first steps, then fall to 0. `autocast` is the precision of the matmuls. Held-out
    windows are measured in float32. All weights and a window's backward pass are in memory.
    """

    steps: Annotated[int, Meta(ge=0)] = 0
    windows: Annotated[int, Meta(ge=0)] = 0
    batch: Count = 4
    scale_rate: NonNegative = 1e-3
    gain_rate: NonNegative = 1e-3
    code_rate: NonNegative = 0.0
    autocast: Autocast = "bfloat16"


class Ranges(Data):
    """Static activation ranges: the extremes seen, the range with the least squared error on them, the one that leaves
    out 0.01 % of the values at either end, or (`output`) the one with the least squared error of what the linears make
    of their input; outputs then take the least error on themselves."""

    method: Literal["minmax", "mse", "percentile", "output"] = "output"


class Samples(Data):
    """What is calibrated on: `windows` windows of `length` tokens, evenly spaced over the corpus."""

    windows: Count = 32
    length: Annotated[int, Meta(ge=2)] = 256


class Recipe(Data):
    """The whole of it. `fallback` says what happens to a linear whose grid the target has no kernel for:
    `per_channel` tries one scale per row with the same bits, `int8` then 8 bits per row, `refuse` stops."""

    name: str
    weights: Weights
    activations: Activations
    description: str = ""
    embedding: Embedding = Embedding()
    head: Weights = Weights(bits=8)
    kv_cache: KvCache = FLOAT_CACHE
    override: tuple[Override, ...] = ()
    fallback: Literal["per_channel", "int8", "refuse"] = "per_channel"
    transforms: Transforms = Transforms()
    learning: Learning = Learning()
    ranges: Ranges = Ranges()
    samples: Samples = Samples()
    rounding: Rounding = Rounding()
    end_to_end: EndToEnd = EndToEnd()

    @property
    def learns_blocks(self) -> bool:
        """Whether anything of a block is learned by gradients: transforms, clipping or rounding."""
        return self.learning.epochs > 0 or self.rounding.method == "learned"
