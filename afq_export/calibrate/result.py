"""What calibration leaves: transforms, clipping, static ranges and the history, one file per block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from afq_export.errors import InputError
from afq_export.files import folder_beside, write_beside, write_text
from afq_export.fold.rotation import Rotation
from afq_export.fold.transform import SiteTransform
from afq_export.quantize.checkpoint import StaticRange
from afq_export.spec.history import History, Tuning
from afq_export.spec.quant import LinearSpec, linear_name
from afq_export.spec.sites import Form
from afq_export.spec.strict import Data

TUNED_OUTER = "outer.safetensors"
"""What end-to-end learning left of the last norm, and its history."""


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """`transforms` by site name (float64), `clips` [O, G] above 0 by role, `ranges` (input, output) by role, `codes`
    int8 [O, I] by role where weights are not rounded to nearest, `tensors`, the grids of all tensors by name for
    targets that keep every one on a grid, and `floats`, the norms' tensors that end-to-end learning changed."""

    transforms: dict[str, SiteTransform]
    clips: dict[str, Tensor]
    ranges: dict[str, tuple[StaticRange, StaticRange | None]]
    history: History
    codes: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    tensors: dict[str, StaticRange] = dataclasses.field(default_factory=dict)
    floats: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What end-to-end learning made of all blocks, the tensors of the last norm that changed, and how it went."""

    blocks: tuple[BlockResult, ...]
    outer: dict[str, Tensor]
    history: Tuning


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The results of all blocks, read from the run folder when asked for: as end-to-end learning left them where it
    has been through."""

    folder: Path
    layers: int

    def block(self, index: int) -> BlockResult:
        """The result of block `index`. Raises InputError when it is missing or broken."""
        tuned = tuned_path(self.folder)
        return read_block(block_path(tuned if tuned.exists() else self.folder, index))

    def outer_floats(self) -> dict[str, Tensor]:
        """Tensors of the last norm that end-to-end learning changed."""
        return _read_tuned(self.folder)[0] if tuned_path(self.folder).exists() else {}

    def tuning(self) -> Tuning | None:
        """How end-to-end learning went, None where there was none."""
        return _read_tuned(self.folder)[1] if tuned_path(self.folder).exists() else None

    def transforms(self) -> Callable[[int], dict[str, SiteTransform]]:
        """Block index -> transforms by site name, for the fold stage."""
        return lambda index: self.block(index).transforms

    def tensors(self) -> dict[str, StaticRange]:
        """The grids of all tensors by their full name (`blocks.0.attn_norm`, `hidden`); none when few are static."""
        found = read_outer(self.folder)
        for index in range(self.layers if found else 0):
            found |= {linear_name(index, name): grid for name, grid in self.block(index).tensors.items()}
        return found

    def rotation(self) -> Rotation | None:
        """What was learned of the rotation, None where nothing was. Raises InputError when it is broken."""
        return read_rotation(self.folder) if rotation_path(self.folder).exists() else None

    def head_clip(self, spec: LinearSpec) -> Tensor:
        """lm_head stands outside of all blocks: its ranges are not clipped. Ones [O, G]."""
        return torch.ones(spec.outputs, spec.groups)


class _Meta(Data, omit_defaults=True):
    forms: dict[str, Form]
    ranges: dict[str, tuple[StaticRange, StaticRange | None]]
    history: History
    tensors: dict[str, StaticRange] = {}


def block_path(folder: Path, index: int) -> Path:
    """The file of block `index` in a calibration folder."""
    return folder / f"block-{index:03d}.safetensors"


def write_block(path: Path, result: BlockResult) -> None:
    """Writes a block's result whole or not at all. Raises InputError when a number in it is not finite."""
    tensors = {f"clip.{role}": clip.contiguous() for role, clip in result.clips.items()}
    tensors |= {f"codes.{role}": codes.contiguous() for role, codes in result.codes.items()}
    tensors |= {f"float.{name}": tensor.contiguous() for name, tensor in result.floats.items()}
    for name, transform in result.transforms.items():
        tensors[f"matrix.{name}"] = transform.matrix.contiguous()
        if transform.shift is not None:
            tensors[f"shift.{name}"] = transform.shift.contiguous()
    history = result.history
    losses = {"loss": torch.tensor([history.rounded_loss, history.start_loss, history.final_loss])}
    for key, tensor in (tensors | losses).items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError("calibration gave a number that is not finite", where=f"{path.name}: {key}")
    forms = {name: transform.form for name, transform in result.transforms.items()}
    meta = msgspec.json.encode(_Meta(forms, result.ranges, result.history, result.tensors)).decode()
    with write_beside(path) as part:
        save_file(tensors, part, metadata={"afq": meta})


def read_block(path: Path) -> BlockResult:
    """Inverse of `write_block`."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            meta = msgspec.json.decode(file.metadata()["afq"], type=_Meta)
    except (OSError, SafetensorError, KeyError, TypeError, msgspec.DecodeError) as error:
        raise InputError("cannot read a block's calibration", where=str(path), why=str(error)) from error
    transforms = {
        name: SiteTransform(form, tensors[f"matrix.{name}"], tensors.get(f"shift.{name}"))
        for name, form in meta.forms.items()
    }
    clips = {key.removeprefix("clip."): t for key, t in tensors.items() if key.startswith("clip.")}
    codes = {key.removeprefix("codes."): t for key, t in tensors.items() if key.startswith("codes.")}
    floats = {key.removeprefix("float."): t for key, t in tensors.items() if key.startswith("float.")}
    return BlockResult(transforms, clips, meta.ranges, meta.history, codes, meta.tensors, floats)


def tuned_path(folder: Path) -> Path:
    """The folder, in a calibration folder, of what end-to-end learning left."""
    return folder / "tuned"


def write_tuned(folder: Path, tuned: Tuned) -> None:
    """Writes what end-to-end learning left, all of it or nothing."""
    with folder_beside(tuned_path(folder)) as part:
        for index, result in enumerate(tuned.blocks):
            write_block(block_path(part, index), result)
        meta = {"afq": msgspec.json.encode(tuned.history).decode()}
        save_file({name: t.contiguous() for name, t in tuned.outer.items()}, part / TUNED_OUTER, metadata=meta)


def _read_tuned(folder: Path) -> tuple[dict[str, Tensor], Tuning]:
    """Inverse of `write_tuned`, without the blocks."""
    path = tuned_path(folder) / TUNED_OUTER
    try:
        with safe_open(path, framework="pt") as file:
            history = msgspec.json.decode(file.metadata()["afq"], type=Tuning)
            return {key: file.get_tensor(key) for key in file.keys()}, history
    except (OSError, SafetensorError, KeyError, TypeError, msgspec.DecodeError) as error:
        raise InputError("cannot read what was learned end to end", where=str(path), why=str(error)) from error


def rotation_path(folder: Path) -> Path:
    """The file of the learned rotation in a calibration folder."""
    return folder / "rotation.safetensors"


def write_rotation(folder: Path, rotation: Rotation) -> None:
    """Writes the learned rotation whole or not at all."""
    tensors = {"residual": rotation.residual.contiguous(), "heads": rotation.heads.contiguous()}
    with write_beside(rotation_path(folder)) as part:
        save_file(tensors, part)


def read_rotation(folder: Path) -> Rotation:
    """Inverse of `write_rotation`."""
    path = rotation_path(folder)
    try:
        with safe_open(path, framework="pt") as file:
            return Rotation(file.get_tensor("residual"), file.get_tensor("heads"))
    except (OSError, SafetensorError) as error:
        raise InputError("cannot read the learned rotation", where=str(path), why=str(error)) from error


def outer_path(folder: Path) -> Path:
    """The file of what stands outside of all blocks."""
    return folder / "outer.json"


def write_outer(folder: Path, tensors: dict[str, StaticRange]) -> None:
    """Writes the grids of `hidden`, `final_norm` and `lm_head`, whole or not at all."""
    write_text(outer_path(folder), msgspec.json.encode(tensors).decode() + "\n")


def read_outer(folder: Path) -> dict[str, StaticRange]:
    """Inverse of `write_outer`; nothing where only linears are static."""
    path = outer_path(folder)
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, StaticRange])
    except msgspec.DecodeError as error:
        raise InputError("cannot read the outer tensors' grids", where=str(path), why=str(error)) from error
