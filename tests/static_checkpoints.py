"""Small quantized decoders with a grid for every tensor, through the real stages: for targets without float tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from afq_export.calibrate.calibrate import calibrate
from afq_export.fold.folded import FoldedCheckpoint
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.corpus import Windows
from afq_export.load.model import open_model
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.quantize.quantize import quantize
from afq_export.quantize.tensors import tensor_bits
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.target import Shapes, TargetProfile
from tests.models import write_model

CONTEXT, PREFILL = 24, 8


def htp_target() -> TargetProfile:
    """The shipped target with a short context."""
    return msgspec.structs.replace(load_target("android-qnn-htp"), shapes=Shapes(context=CONTEXT, prefill=PREFILL))


def random_windows(count: int = 4, length: int = 16) -> Windows:
    """Random ids: for what no text is needed for."""
    ids = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(5))
    return Windows(ids, "random", "-", length, count, "-", length)


def static_checkpoint(
    folder: Path, recipe: str, changes: Sequence[str] = (), kind: str = "llama"
) -> tuple[FloatCheckpoint, QuantizedCheckpoint]:
    """A random model of `kind`, calibrated and quantized for `htp_target`; both in `folder`."""
    model, target = open_model(str(write_model(folder / "model", kind))), htp_target()
    chosen = load_recipe(recipe, tuple(changes))
    records = assign(model.config, chosen, target)
    bits = tensor_bits(chosen.activations.bits, target)
    (folder / "calibration").mkdir()
    calibration = calibrate(model, chosen, records, random_windows(), folder / "calibration", 0, silent, bits)
    folded = FoldedCheckpoint(model, calibration.transforms())
    return model, quantize(folded, calibration, records, chosen.embedding, folder / "quantized", {}, silent)
