"""What a path on the command line is. No torch."""

from __future__ import annotations

import enum
from pathlib import Path

from afq_export.errors import InputError
from afq_export.runfolder import RunFolder


class Kind(enum.Enum):
    """What afq-export makes or reads."""

    RUN = "run folder"
    BUNDLE = "bundle"
    QUANTIZED = "quantized checkpoint"
    PROGRAM = "program"
    MODEL = "model"


_MARKS = {
    "run.json": Kind.RUN, "manifest.json": Kind.BUNDLE, "quant.json": Kind.QUANTIZED, "config.json": Kind.MODEL,
}  # fmt: skip
"""File in a folder -> what the folder is; a bundle has a config.json too, so the order counts."""
_SUFFIXES = {".pte": Kind.PROGRAM, ".onnx": Kind.PROGRAM, ".xml": Kind.PROGRAM, ".gguf": Kind.MODEL}


def kind_of(path: Path) -> Kind:
    """The kind of `path`. Raises InputError when it is none, or not there."""
    if path.is_file():
        if path.suffix in _SUFFIXES:
            return _SUFFIXES[path.suffix]
        raise InputError(
            "unknown kind of file",
            where=str(path),
            do=f"known: {', '.join(_SUFFIXES)}, folders; baselines: `baseline show`",
        )
    if not path.is_dir():
        raise InputError("no such file or folder", where=str(path))
    for mark, kind in _MARKS.items():
        if (path / mark).is_file():
            return kind
    raise InputError("unknown kind of folder", where=str(path), why=f"none of {', '.join(_MARKS)} is in it")


def bundle_folder(path: Path) -> Path:
    """The bundle at `path`: itself, or that of a run folder. Raises InputError."""
    kind = kind_of(path)
    if kind is Kind.RUN:
        return RunFolder(path).bundle
    if kind is not Kind.BUNDLE:
        raise InputError("not a bundle", where=str(path), why=f"it is a {kind.value}")
    return path


def run_folder(path: Path) -> RunFolder:
    """The run folder at `path`, or the one that the bundle at `path` lies in. Raises InputError."""
    kind = kind_of(path)
    if kind is Kind.RUN:
        return RunFolder(path)
    parent = path.resolve().parent
    if kind is Kind.BUNDLE and (parent / "run.json").is_file():
        return RunFolder(parent)
    raise InputError(
        "no run folder", where=str(path), why="validation needs the quantized checkpoint and what it was made from",
        do="name the run folder that the bundle was made in",
    )  # fmt: skip
