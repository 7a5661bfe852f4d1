"""The load stage: a path, a GGUF file or a hub id -> FloatCheckpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.errors import InputError
from afq_export.files import sha256_file
from afq_export.load.checkpoint import FloatCheckpoint, TensorSource
from afq_export.load.config import read_config
from afq_export.load.gguf import GgufSource
from afq_export.load.origin import folder_origin, gguf_origin
from afq_export.load.safetensors import SafetensorsSource
from afq_export.spec.catalog import demo_model

DEMOS = ("demo-llama", "demo-opt")
"""The embedded demo models."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt")
_DERIVED_KEYS = re.compile(r".*rotary_emb\.inv_freq|.*\.masked_bias")
"""Buffers that old checkpoints carry and that are computed from the configuration."""


def open_model(name: str) -> FloatCheckpoint:
    """The model called `name`: a Hugging Face folder, a `.gguf` file, a hub id `owner/model`, or one of DEMOS.

    No tensor is read but headers and, for the digest, the bytes of the files. Raises InputError when there is no such
    model, it is not supported, or its tensors and its configuration do not fit each other.
    """
    path = Path(name)
    if name in DEMOS and not path.exists():
        return dataclasses.replace(_open_folder(demo_model(name.removeprefix("demo-")), name), name=name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError("no such file", where=name)
        return _open_gguf(path)
    if path.is_dir():
        return _open_folder(path, name)
    if path.exists():
        raise InputError("not a model", where=name, why="neither a folder nor a .gguf file")
    if _HUB_ID.fullmatch(name):
        return _open_folder(_download(name), name)
    raise InputError("no such model", where=name, do="give a folder, a .gguf file, or a hub id owner/model")


def _open_folder(folder: Path, name: str) -> FloatCheckpoint:
    config, _ = read_config(folder)
    source = SafetensorsSource(folder)
    _check_tensors(config, source, str(folder))
    return FloatCheckpoint(config, source, name, _digest(source.paths), files=folder, origin=folder_origin(folder))


def _open_gguf(path: Path) -> FloatCheckpoint:
    config, _ = read_config(path.parent, gguf=path)
    source = GgufSource(path, config)
    if config.rope is not None:
        config = dataclasses.replace(config, rope=source.rope(config.rope))
    _check_tensors(config, source, str(path))
    digest, origin = _digest(source.paths), gguf_origin(path)
    return FloatCheckpoint(config, source, str(path), digest, files=path.parent, gguf=path, origin=origin)


def _download(name: str) -> Path:
    """The local snapshot of a hub model; downloads it unless HF_HUB_OFFLINE is set."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=["consolidated*", "*/*"]))
    except Exception as error:  # offline, unknown, gated: the hub client has a dozen exception types
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        raise InputError(
            "cannot get the model from the hub",
            where=name,
            why="HF_HUB_OFFLINE is set and it is not in the cache" if offline else str(error).split("\n")[0],
            do="go online, or give a local folder or a .gguf file",
        ) from error


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint key -> shape of everything that the family reads."""
    arch = family(config)
    linears = arch.linear_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(config.layers):
        for ours, key in arch.block_names(config, index).items():
            role, kind = ours.rsplit(".", 1)
            if role in linears:
                outputs, inputs, _ = linears[role]
                shapes[key] = (outputs, inputs) if kind == "weight" else (outputs,)
            else:
                shapes[key] = (config.head_dim,) if role in ("q_norm", "k_norm") else (config.hidden,)
    for ours, key in (arch.embedding_names(config) | arch.head_names(config)).items():
        if ours == "embed_positions.weight":
            shapes[key] = (config.max_positions + config.position_offset, config.hidden)
        else:
            shapes[key] = (config.hidden,) if ours.startswith("final_norm") else (config.vocab, config.hidden)
    return shapes


def _check_tensors(config: DecoderConfig, source: TensorSource, where: str) -> None:
    """Every expected tensor is there in its shape, and every tensor there is expected."""
    expected, found = expected_shapes(config), source.shapes()
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise InputError("tensors are missing", where=where, why=_some(missing))
    tied_copy = {"lm_head.weight"} if config.tied else set()
    extra = sorted(key for key in found.keys() - expected.keys() - tied_copy if not _DERIVED_KEYS.fullmatch(key))
    if extra:
        raise InputError("tensors that no part of the model reads", where=where, why=_some(extra))
    for key, shape in expected.items():
        if tuple(found[key]) != shape:
            raise InputError(
                "a tensor contradicts config.json",
                where=f"{where}: {key}",
                why=f"its shape is {list(found[key])}, the configuration says {list(shape)}",
            )


def _some(keys: list[str]) -> str:
    """The first few keys and how many more."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _digest(paths: list[Path]) -> str:
    """One sha256 over the files' sha256, in the order of their names."""
    lines = "\n".join(sha256_file(path) for path in sorted(paths))
    return hashlib.sha256(lines.encode()).hexdigest()
