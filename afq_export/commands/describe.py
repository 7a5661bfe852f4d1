"""What `inspect` says of a thing: facts and a table of its linears."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from afq_export.backends import backend
from afq_export.errors import InputError, MissingToolError
from afq_export.extras import install_line
from afq_export.files import sha256_file
from afq_export.lower.bundle import Bundle, open_bundle
from afq_export.paths import Kind
from afq_export.quantize.checkpoint import QuantizedCheckpoint, open_checkpoint
from afq_export.report.layers import LayerGroup, groups_text, layer_groups
from afq_export.report.tables import cache_line, size_mb
from afq_export.runfolder import RunFolder
from afq_export.runtime.qnn import FILE as QNN_FILE
from afq_export.spec.strict import Data
from afq_export.spec.target import BackendName

STAGES = ("calibrate", "quantize", "lower", "validate")
USUAL: dict[str, BackendName] = {".onnx": "onnxruntime", ".xml": "openvino"}
"""Suffix of a program file by itself -> the backend that it is taken for; a .pte says what it is, and
beside a QNN program lies its model.json."""
DELEGATES: dict[str, BackendName] = {
    "XnnpackBackend": "xnnpack",
    "VulkanBackend": "vulkan",
    "CoreMLBackend": "coreml",
    "EthosUBackend": "ethos-u",
}
"""ExecuTorch's name of a delegate -> the backend whose programs have it."""
CORTEX_M = "cortex_m::"
"""Cortex-M programs have no delegate, but operators of their own."""


class Facts(Data):
    """`kind` of thing, what is known of it, and its linears."""

    kind: str
    facts: dict[str, Any]
    layers: tuple[LayerGroup, ...] = ()

    def text(self) -> str:
        """For a reader."""
        lines = {"": self.kind} | {name: _text(value) for name, value in self.facts.items()}
        width = max(map(len, lines))
        table = ["", groups_text(self.layers)] if self.layers else []
        return "\n".join([f"{name.ljust(width)}  {value}".strip() for name, value in lines.items()] + table)


def thing(path: Path, kind: Kind) -> Facts:
    """Facts of what is at `path`. Raises InputError when it is broken or was changed."""
    if kind is Kind.MODEL:
        return model(str(path))
    if kind is Kind.PROGRAM:
        return program(path)
    if kind is Kind.QUANTIZED:
        return quantized(open_checkpoint(path))
    return bundle(open_bundle(path)) if kind is Kind.BUNDLE else run(RunFolder(path))


def model(name: str) -> Facts:
    """A float model: sizes and digest. No tensor is read."""
    from afq_export.load.model import expected_shapes, open_model

    opened = open_model(name)
    c = opened.config
    facts = {
        "name": opened.name,
        "type": f"{c.model_type} (family {c.family})",
        "parameters": sum(math.prod(shape) for shape in expected_shapes(c).values()),
        "blocks": f"{c.layers} of width {c.hidden}, MLP {c.intermediate}",
        "heads": f"{c.heads} query, {c.kv_heads} key and value, {c.head_dim} wide",
        "vocabulary": f"{c.vocab} tokens, head {'tied to' if c.tied else 'apart from'} the embedding",
        "context": c.max_positions,
        "weights sha256": opened.digest,
    }
    return Facts(Kind.MODEL.value, facts)


def quantized(checkpoint: QuantizedCheckpoint) -> Facts:
    """A quantized checkpoint; its files' sha256 were checked when it was opened."""
    embedding = f"int{checkpoint.embedding_bits}" if checkpoint.embedding_bits < 32 else "float32"
    group = f" g{checkpoint.embedding_group}" if checkpoint.embedding_group else ""
    source, kept = checkpoint.provenance, checkpoint.kv_cache
    facts = {
        "folder": str(checkpoint.folder),
        **{key: source[key] for key in ("model", "recipe", "target", "seed") if key in source},
        "embedding": embedding + group,
        "KV cache": f"int{kept.bits}{f' g{kept.group}' if kept.group else ''}" if kept.quantized else "float32",
        "files": f"{checkpoint.config.layers + 1} tensor files, every sha256 as in quant.json",
        "quant.json sha256": checkpoint.digest,
    }
    return Facts(Kind.QUANTIZED.value, facts, layer_groups(checkpoint.records))


def program(path: Path, made_by: BackendName | None = None) -> Facts:
    """A program file: its bytes, and the linears read back from it. `made_by` where it does not show in the file.

    Raises InputError when it is no program of this package, MissingToolError without what reads its format.
    """
    try:
        inside, linears = backend(made_by or maker(path)).describe(path)
    except ModuleNotFoundError as error:
        tool = (error.name or "").split(".")[0]
        why = f"no Python module {tool}"
        raise MissingToolError("a tool is missing", where=str(path), why=why, do=install_line(tool)) from error
    groups = tuple(
        LayerGroup("read back from the file", count, outputs, inputs, weight, activation, kernel)
        for (kernel, outputs, inputs, weight, activation), count in Counter(linears).items()
    )
    facts = {"file": str(path), "size": size_mb(path.stat().st_size), "sha256": sha256_file(path)}
    return Facts(Kind.PROGRAM.value, facts | inside, groups)


def maker(path: Path) -> BackendName:
    """The backend that reads a program file by itself. Raises InputError when no backend here made it."""
    if path.suffix == ".onnx" and (path.parent / QNN_FILE).is_file():
        return "qnn"
    if path.suffix != ".pte":
        return USUAL[path.suffix]
    from afq_export.lower.executorch.readback import read_outline

    outline = read_outline(path.read_bytes())
    names = {delegate.backend for delegate in outline.delegates}
    if not names and any(name.startswith(CORTEX_M) for name in outline.calls):
        return "cortex-m"
    found = {DELEGATES.get(name) for name in names} or {"xnnpack"}  # in float it has no delegate
    made_by = found.pop()
    if made_by is None or found:
        why = f"its delegates are of {', '.join(sorted(names))}"
        raise InputError("not a program of this package", where=str(path), why=why, do=f"known: {', '.join(DELEGATES)}")
    return made_by


def bundle(opened: Bundle) -> Facts:
    """A bundle; its files' sha256 were checked when it was opened."""
    manifest, inside = opened.manifest, program(opened.model, opened.backend)
    report = opened.report()
    verdict = report.verdict if report else "not validated yet"
    facts = {
        "folder": str(opened.folder),
        "model": manifest.model.name,
        "weights sha256": manifest.model.digest,
        "recipe": manifest.recipe,
        "target": manifest.target,
        **({"KV cache": cache_line(manifest.kv_cache)} if manifest.kv_cache else {}),
        "verdict": verdict,
        "made by": " ".join(manifest.command),
        "files": f"{len(manifest.files)} files, every sha256 as in manifest.json",
        opened.model.name: f"{inside.facts['size']}, sha256 {inside.facts['sha256']}",
    }
    return Facts(Kind.BUNDLE.value, facts, inside.layers)


def run(folder: RunFolder) -> Facts:
    """A run folder: what was asked, what each stage cost, and the furthest result there is."""
    data = folder.read()
    request = {key: value for key, value in data.get("request", {}).items() if value not in (None, [], False)}
    asked = " ".join(f"{key}={value}" for key, value in request.items() if key not in ("cwd", "model_name"))
    facts = {"folder": str(folder.path), "model": request.get("model_name", "?"), "asked": asked}
    for stage in STAGES:
        cost = data.get("cost", {}).get(stage)
        facts[stage] = f"{cost['seconds']:.1f} s, peak {cost['peak_rss_mb']:.0f} MB" if cost else "not run"
    blocks = len(list(folder.calibration.glob("block-*.safetensors")))
    facts["calibrated blocks"] = blocks
    layers: tuple[LayerGroup, ...] = ()
    if (folder.quantized / "quant.json").is_file():
        layers = quantized(open_checkpoint(folder.quantized)).layers
    if (folder.bundle / "manifest.json").is_file():
        try:
            inside = bundle(open_bundle(folder.bundle))
        except InputError as error:
            facts["bundle"] = str(error)
        else:
            facts |= {"bundle": inside.facts["files"], "verdict": inside.facts["verdict"]}
    return Facts(Kind.RUN.value, facts, layers)


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
