"""Tensors of a Hugging Face folder, one at a time, from one safetensors file or from shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from afq_export.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsSource:
    """A TensorSource over the safetensors files of a folder. Files are memory-mapped; nothing is read at opening."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError when there are no safetensors files, or one is truncated or not a safetensors file."""
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.paths = _files(folder)
        for path in self.paths:
            with _open(path) as file:
                for key in file.keys():
                    if key in self._where:
                        raise InputError("a tensor stands in two files", where=f"{path}: {key}")
                    self._where[key] = path
                    self._shapes[key] = tuple(file.get_slice(key).get_shape())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, key: str) -> Tensor:
        with _open(self._where[key]) as file:
            return file.get_tensor(key)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = any(Path(name).name != name or not name.isprintable() for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError("cannot read the shard index", where=str(index), why=str(error)) from error
        if outside:
            raise InputError("the shard index names files outside of its folder", where=str(index))
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    raise InputError(
        "no safetensors in the model folder",
        where=str(folder),
        why=f"{', '.join(pickles)} are pickles, which are never loaded" if pickles else f"neither {SINGLE} nor {INDEX}",
        do="save the model with save_pretrained(..., safe_serialization=True)" if pickles else "",
    )


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(
            "cannot read safetensors", where=str(path), why=str(error), do="copy or download the file again"
        ) from error
