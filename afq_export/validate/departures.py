"""Why the exported file and the integer reference choose differently at a token.

The linears are equal bit for bit (layers.py), so with torch between them the two can differ only by the float32
rounding of what lies there: norms, rotary embedding, attention, residuals, about 1e-6 of a logit. That decides an
argmax in two ways: directly, where two logits nearly tie; or by moving an activation over a rounding border, so that an
int8 code in the input of some linear flips by one, which costs up to whole logits. The second is shown by running the
integer reference again with everything between the linears in float64: what an activation moves by is its float32
noise, and one that lies nearer to a rounding border than a few times that noise flips in a runtime that adds in another
order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from afq_export.arch import decoder
from afq_export.progress import Progress, silent
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.spec.quant import linear_name
from afq_export.spec.report import Disagreement
from afq_export.spec.target import TargetProfile
from afq_export.validate.evaluate import Measurement
from afq_export.validate.rungs import ObservedOps, QuantizedRung, integer_rung, run_block, unrounded_codes

NEAR_TIE = 1e-4
"""A logit gap of at most this part of the largest |logit| is a near tie: float32 sums in another order close it."""


NOISE_SLACK = 8
"""The runtime's norms, exponentials and sums may err this many times as much as ours between float32 and float64."""


@dataclasses.dataclass(frozen=True)
class FlippedStep:
    """The first token of a window at which an int8 code in the input of `layer` hangs on the last float bits."""

    layer: str
    position: int


def explain_disagreements(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    ids_NT: Tensor,
    measurement: Measurement,
    progress: Progress = silent,
) -> list[Disagreement]:
    """One entry per token where `runtime` and `integer` choose differently. Needs that pair in `measurement`.

    A program without float tensors has no float32 noise: what is no near tie is `unexplained` (see single_steps.py).
    """
    pair = measurement.pairs["integer", "runtime"]
    reference, runtime = measurement.rungs["integer"].top1, measurement.rungs["runtime"].top1
    flips: dict[int, list[FlippedStep]] = {}
    found = []
    places = (~pair.same).nonzero().tolist()
    for number, (window, position) in enumerate(places):
        progress("disagreements", number, len(places))
        margin = float(pair.margin[window, position])
        if margin > NEAR_TIE and window not in flips and not checkpoint.tensors:
            flips[window] = list(flipped_steps(checkpoint, target, ids_NT[window]))
        upstream = (flip.layer for flip in flips.get(window, ()) if flip.position <= position)
        layer = None if margin <= NEAR_TIE else next(upstream, None)
        found.append(
            Disagreement(
                window=window,
                position=position,
                reference=int(reference[window, position]),
                runtime=int(runtime[window, position]),
                margin=margin,
                reason="near_tie" if margin <= NEAR_TIE else "flipped_step" if layer else "unexplained",
                layer=layer,
            )
        )
    return found


@torch.no_grad()
def flipped_steps(checkpoint: QuantizedCheckpoint, target: TargetProfile, ids_T: Tensor) -> Iterator[FlippedStep]:
    """Linears, in the order in which they run, some of whose input codes the float32 noise decides."""
    config = checkpoint.config
    single = integer_rung(checkpoint, target, torch.float32)
    double = integer_rung(checkpoint, target, torch.float64)
    states = [rung.embed(ids_T[None]) for rung in (single, double)]
    for index in range(config.layers):
        inputs: list[dict[str, Tensor]] = [{}, {}]
        states = [
            run_block(rung, ObservedOps(rung.block(index), seen.__setitem__), x)
            for rung, seen, x in zip((single, double), inputs, states, strict=True)
        ]
        for role, linear in checkpoint.block(index).items():
            flip = _first_flip(linear_name(index, role), linear, inputs[0][role], inputs[1][role])
            if flip:
                yield flip
    inputs = [{}, {}]
    for rung, seen, x in zip((single, double), inputs, states, strict=True):
        _observe_head(rung, seen, x)
    flip = _first_flip("lm_head", checkpoint.linear("lm_head"), inputs[0]["lm_head"], inputs[1]["lm_head"])
    if flip:
        yield flip


def _observe_head(rung: QuantizedRung, seen: dict[str, Tensor], x: Tensor) -> None:
    decoder.head(ObservedOps(rung.head(), seen.__setitem__), x)


def _first_flip(name: str, linear: QuantizedLinear, single_1TI: Tensor, double_1TI: Tensor) -> FlippedStep | None:
    """The first token that has a code within its noise of a rounding border (a flipped code always is)."""
    single_TI, double_TI = (unrounded_codes(linear, x[0].float()) for x in (single_1TI, double_1TI))
    noise_T1 = (single_TI - double_TI).abs().amax(-1, keepdim=True)
    to_border_TI = (single_TI - single_TI.floor() - 0.5).abs()
    tokens = ((to_border_TI <= NOISE_SLACK * noise_T1) & (noise_T1 > 0)).any(-1).nonzero().flatten()
    return FlippedStep(name, int(tokens[0])) if len(tokens) else None
