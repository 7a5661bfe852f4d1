"""model.ort: the optimised graph in ONNX Runtime's own format, for builds that hold only the operators they need.

A phone's build of ONNX Runtime may have neither the ONNX parser nor the graph optimiser. So the optimised graph is
saved ("Fixed" style), and with it the list of operators and types that such a build must have.

1. What the optimiser decides is in the file and no session option changes it later: the kernels that QDQ groups became,
   and the accuracy level of every MatMulNBits. That is why the target's session options are given to the conversion.
2. The file is for ARM whatever machine writes it. `extended` is the highest level: above it layouts of the converting
   CPU come in. Signed activations stay signed (`session.qdqisint8allowed`), as on ARM, and the remedy for x86 without
   VNNI (`session.x64quantprecision`) is left out: it depends on the converting CPU, and ARM has no saturation to cure.
3. "Runtime" style, which leaves part of the optimisation to the device, is not offered: ONNX Runtime 1.31 then writes
   int4 tensors that it refuses to load.

Source: onnxruntime.tools.convert_onnx_models_to_ort, whose choices for `--target_platform arm` these are;
kOrtSessionOptionsConfigSaveModelFormat and its neighbours in onnxruntime_session_options_config_keys.h.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from afq_export.errors import InputError, VerdictError
from afq_export.files import write_beside
from afq_export.lower.onnx.ort_bytes import canonical

ORT_MODEL = "model.ort"
ORT_CONFIG = "model.required_operators_and_types.config"
LARGEST = (1 << 31) - 1
"""Bytes of a file in this format: its offsets are 32 bits, signed."""

OPTIMIZATION = "graph_optimization_level"
LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}
ONLY_X86 = ("session.x64quantprecision",)
FOR_ARM = {"session.qdqisint8allowed": "1", "session.save_model_format": "ORT"}
FOREIGN = ("com.microsoft.nchwc", "com.microsoft.dml")
"""Domains of operators that only other machines than the target have."""

HEADER = """\
# What model.ort needs of ONNX Runtime, for its build option --include_ops_by_config
# (with --enable_reduced_operator_type_support the types count too).
"""
TOOL = """\
import logging, pathlib, sys
sys.modules["torch"] = None
logging.disable(logging.CRITICAL)
from onnxruntime.tools.ort_format_model import create_config_from_models
create_config_from_models([pathlib.Path(sys.argv[1])], pathlib.Path(sys.argv[2]), True)
"""
"""Run in a process of its own: the module changes sys.path and the logging of the process that imports it. Without
torch, which the package would import for something else if it is there: that takes ten times as long as the rest."""


@dataclasses.dataclass(frozen=True)
class OrtFiles:
    """The two files, and the operators that the first needs: (domain, name), `ai.onnx` for ONNX's own."""

    model: Path
    config: Path
    operators: frozenset[tuple[str, str]]


def write_ort_format(model: Path, folder: Path, session: Mapping[str, str]) -> OrtFiles:
    """Writes model.ort and its list of operators to `folder`, both or none.

    `session`: the target's session options, `graph_optimization_level` (disable, basic, extended, all) and
    configuration entries. Raises InputError when `model` is missing, larger than the format holds or not convertible,
    and VerdictError when what came out has other inputs or outputs, or operators of another kind of machine.
    """
    options = _options(session)
    _check_size(model)
    with write_beside(folder / ORT_MODEL) as part, write_beside(folder / ORT_CONFIG) as config:
        options.optimized_model_filepath = str(part)
        before = _open(model, options, "cannot convert the model")
        part.write_bytes(canonical(part.read_bytes()))
        after = _open(part, _quiet(), "the converted model does not load")
        _check_interface(before, after, model)
        operators = _write_config(part, config)
        foreign = sorted(f"{domain}.{name}" for domain, name in operators if domain in FOREIGN)
        if foreign:
            raise VerdictError("model.ort is bound to this machine", where=str(model), why=", ".join(foreign))
    return OrtFiles(folder / ORT_MODEL, folder / ORT_CONFIG, operators)


def _options(session: Mapping[str, str]) -> ort.SessionOptions:
    options = _quiet()
    level = session.get(OPTIMIZATION, "extended")
    if level not in LEVELS:
        raise InputError("unknown optimisation level", where=level, do=f"take one of {', '.join(LEVELS)}")
    options.graph_optimization_level = LEVELS[level]
    entries = {key: value for key, value in session.items() if key != OPTIMIZATION and key not in ONLY_X86}
    for key, value in (entries | FOR_ARM).items():
        options.add_session_config_entry(key, value)
    return options


def _quiet() -> ort.SessionOptions:
    """One thread, errors only: ONNX Runtime warns whenever an optimised graph is saved."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


def _check_size(model: Path) -> None:
    """The weights beside model.onnx come into the one file too."""
    if not model.is_file():
        raise InputError("no model", where=str(model))
    size = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*") if path.is_file())
    if size > LARGEST:
        raise InputError(
            "the model is too large for ONNX Runtime's format",
            where=str(model),
            why=f"{size >> 20} MiB, a file of this format has less than 2048",
            do="use model.onnx with its external data, or fewer bits",
        )


def _open(path: Path, options: ort.SessionOptions, what: str) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(_readable(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise InputError(what, where=str(path), why=str(error).split("\n")[0]) from error


def _readable(path: Path) -> str | bytes:
    """A file in ONNX Runtime's format is known by its name's end or, as bytes, by what is in it."""
    return str(path) if path.suffix == ".onnx" else path.read_bytes()


def _check_interface(before: ort.InferenceSession, after: ort.InferenceSession, model: Path) -> None:
    for side in ("get_inputs", "get_outputs"):
        was, now = ([(v.name, v.type, v.shape) for v in getattr(session, side)()] for session in (before, after))
        if was != now:
            raise VerdictError("model.ort is not the model", where=str(model), why=f"{side[4:]} {now}, were {was}")


def _write_config(model: Path, config: Path) -> frozenset[tuple[str, str]]:
    """The operator list of `model`, under a header that names no path. Returns the operators."""
    command = [sys.executable, "-c", TOOL, os.fspath(model.resolve()), os.fspath(config.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VerdictError("the operators of model.ort cannot be listed", where=str(model), why=why)
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    config.write_text(HEADER + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return frozenset(pair for line in lines for pair in _operators(line))


def _operators(line: str) -> list[tuple[str, str]]:
    """`domain;opset;Name{"types"},Name,...` -> (domain, name) of each."""
    domain, _, rest = line.split(";", 2)
    while re.search(r"\{[^{}]*\}", rest):
        rest = re.sub(r"\{[^{}]*\}", "", rest)
    return [(domain, name) for name in rest.split(",") if name]
