"""From a quantized checkpoint to a generation-ready ONNX file, checked, saved and read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_model

from afq_export.errors import InputError, VerdictError
from afq_export.lower.onnx.cache import OPSET as CACHE_OPSET
from afq_export.lower.onnx.decoder import rotary_tables, write_decoder
from afq_export.lower.onnx.embedding import stored_tables
from afq_export.lower.onnx.hadamard import MATRIX, stored_matrix
from afq_export.lower.onnx.interface import shapes
from afq_export.lower.onnx.linears import STORED, stored_group, stored_scales
from afq_export.lower.onnx.readback import INTEGER, OnnxContent, read_onnx
from afq_export.lower.stored import StoredLinear, difference
from afq_export.progress import Progress
from afq_export.quantize.assign import HEAD, session_options
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.spec.target import TargetProfile

MODEL, EXTERNAL = "model.onnx", "model.onnx.data"
SESSION = "session_options"
CONTEXT = "context_length"
"""Keys of metadata_props."""
MEGABYTE = 1_000_000
FIRST_OPSET, LAST_OPSET = 23, 26
FIRST_IR, LAST_IR = 11, 13
"""What ONNX Runtime 1.31 takes at most; onnx 1.23 would write opset 28 and IR 14."""


def lower_onnx(
    checkpoint: QuantizedCheckpoint, target: TargetProfile, folder: Path, provenance: dict[str, str], progress: Progress
) -> OnnxContent:
    """Writes model.onnx (and model.onnx.data) to `folder` and gives what was read back from it.

    Raises InputError for what the runtime does not take, VerdictError when the finished file is not the checkpoint.
    """
    path, beside = folder / MODEL, folder / EXTERNAL
    model = build(checkpoint, target, provenance, progress, beside)
    if beside.exists() and beside.stat().st_size <= target.onnx.external_data_mb * MEGABYTE:
        load_external_data_for_model(model, str(folder))
        for tensor in model.graph.initializer:  # it says that they are in the file, which the file need not
            tensor.ClearField("data_location")
        beside.unlink()
    onnx.save(model, path)
    del model
    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise VerdictError("the ONNX file is not valid", where=MODEL, why=str(error)) from error
    content = read_onnx(path)
    verify(checkpoint, target, content)
    steps = checkpoint.config.layers + 2
    progress("lower", steps, steps)
    return content


def build(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    provenance: dict[str, str],
    progress: Progress,
    beside: Path | None = None,
) -> ModelProto:
    """The model in memory, its tensors in the file `beside` when one is named (see OnnxGraph)."""
    config = checkpoint.config
    graph = write_decoder(checkpoint, target, context_length(checkpoint, target), progress, beside)
    inputs, outputs = shapes(config, checkpoint.kv_cache)
    kinds = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), TensorProto.INT64)
    kinds["logits"] = TensorProto.FLOAT
    cached = TensorProto.UINT8 if checkpoint.kv_cache.quantized else TensorProto.FLOAT
    values = [
        [helper.make_tensor_value_info(name, kinds.get(name, cached), shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    made = helper.make_graph(graph.nodes, "decoder", *values, initializer=list(graph.initializers.values()))
    opset = opset_of(checkpoint, target)
    ir = max(target.onnx.ir_version, helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir, producer_name="afq-export"
    )
    facts = provenance | {
        SESSION: json.dumps(session_options(checkpoint.records, target), sort_keys=True),
        CONTEXT: str(context_length(checkpoint, target)),
    }
    helper.set_model_props(model, facts)
    return model


def context_length(checkpoint: QuantizedCheckpoint, target: TargetProfile) -> int:
    """The longest sequence: the smaller of the target's and the model's."""
    return min(target.shapes.context, checkpoint.config.max_positions)


def opset_of(checkpoint: QuantizedCheckpoint, target: TargetProfile) -> int:
    """The target's opset, or a later one when a kernel's types or a quantized cache need it."""
    kernels = (target.kernel(record.kernel) for record in checkpoint.records.values())
    cache = CACHE_OPSET if checkpoint.kv_cache.quantized else 0
    return max(target.onnx.opset, cache, *(kernel.opset for kernel in kernels))


def verify(checkpoint: QuantizedCheckpoint, target: TargetProfile, content: OnnxContent) -> None:
    """Raises VerdictError naming the first linear, or else float tensor, that the file lacks or holds otherwise."""
    for name in checkpoint.records:
        found = content.linears.get(name)
        wrong = "it is not there" if found is None else difference(_expected(checkpoint.linear(name), target), found)
        if wrong:
            raise VerdictError("the file is not the checkpoint", where=name, why=wrong)
    if len(content.linears) != len(checkpoint.records):
        more = next(name for name in content.linears if name not in checkpoint.records)
        raise VerdictError("the file has linears of its own", where=more)
    for name, array in _others(checkpoint, target).items():
        if name not in content.tensors or not np.array_equal(content.tensors[name], array):
            raise VerdictError("the file is not the checkpoint", where=name, why="its numbers are not there")


def _expected(linear: QuantizedLinear, target: TargetProfile) -> StoredLinear:
    """What the file must hold of a linear."""
    kernel = target.kernel(linear.record.kernel)
    group, stored = stored_group(linear.spec, kernel), np.dtype(STORED[kernel.stored_bits])
    kind = f"{stored}{f' in blocks of {group}' if group else ''}"
    if kernel.arithmetic == "onnxruntime.dynamic_per_token":
        kind = INTEGER[kernel.activation_bits]
    bias = None if linear.bias is None else linear.bias.float().numpy()
    return StoredLinear(
        kind,
        linear.codes.numpy(),
        stored_scales(linear, kernel),
        bias,
        linear.record.input,
        linear.record.output,
    )


def _others(checkpoint: QuantizedCheckpoint, target: TargetProfile) -> dict[str, np.ndarray]:
    """Name and values of token rows, norms, learned positions and rotary tables."""
    config, head = checkpoint.config, checkpoint.linear(HEAD)
    found = stored_tables(checkpoint.embedding(), head, target.kernel(head.record.kernel).stored_bits)
    found |= {name: tensor.float().numpy() for name, tensor in checkpoint.embedding_floats().items()}
    if config.rope:
        found |= rotary_tables(config, context_length(checkpoint, target))
    if config.down_hadamard:
        found[MATRIX] = stored_matrix(config.down_hadamard)
    for index in range(checkpoint.config.layers):
        found |= {f"blocks.{index}.{n}": t.float().numpy() for n, t in checkpoint.block_floats(index).items()}
    return found | {f"head.{name}": tensor.float().numpy() for name, tensor in checkpoint.head_floats().items()}


def require_opset(target: TargetProfile) -> None:
    """Raises InputError when the target's opset or IR version is not one that file and runtime can have."""
    from onnx.defs import onnx_opset_version

    options = target.onnx
    asked = {"onnx.opset": options.opset} | {f"opset of {k.name}": k.opset for k in target.kernels if k.opset}
    for what, opset in asked.items():
        if not FIRST_OPSET <= opset <= min(LAST_OPSET, onnx_opset_version()):
            raise InputError(
                "the opset does not fit",
                where=f"target {target.name}: {what} = {opset}",
                why=f"{FIRST_OPSET} is the first with a decoder's operators, "
                f"{LAST_OPSET} the last that ONNX Runtime takes",
            )
    if not FIRST_IR <= options.ir_version <= LAST_IR:
        raise InputError(
            "the IR version does not fit",
            where=f"target {target.name}: onnx.ir_version = {options.ir_version}",
            why=f"opset {FIRST_OPSET} needs {FIRST_IR}, ONNX Runtime takes {LAST_IR} at most",
        )
