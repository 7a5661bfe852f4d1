"""From a quantized checkpoint to the files of a Qualcomm bundle.

prefill.onnx, decode.onnx             the graphs (decoder.py), weights in prefill.onnx.data, which both share
prefill_ctx.onnx, prefill_ctx_qnn.bin the same compiled for the target's HTP: what a device loads
decode_ctx.onnx, decode_ctx_qnn.bin
host.safetensors                      token rows and rotary tables: looked up on the host
model.json                            shapes and grids of inputs and outputs, context, options
vectors.safetensors                   test vectors in codes: a prefill call and the decode call after it
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, helper
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from afq_export.arch.attention import rope_tables
from afq_export.errors import VerdictError
from afq_export.lower.qnn.decoder import StaticGraph, write_graph
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.runtime.qnn import HOST, HostFile, StepFile, ValueFile, compile_context, write_host_file
from afq_export.runtime.qnn_session import QnnSession
from afq_export.spec.target import TargetProfile

DATA = "prefill.onnx.data"
SMALL = 1024
"""Bytes of a tensor that stays in the graph's own file."""


def lower_qnn(
    checkpoint: QuantizedCheckpoint, target: TargetProfile, folder: Path, provenance: dict[str, str], progress: Progress
) -> None:
    """Writes every file of the module's table but the test vectors to `folder`."""
    file = write_programs(checkpoint, target, folder, provenance, progress)
    for name in file.steps:
        compile_context(folder, name, file)
    steps = checkpoint.config.layers + 2
    progress("lower", steps, steps)


def write_programs(
    checkpoint: QuantizedCheckpoint, target: TargetProfile, folder: Path, provenance: dict[str, str], progress: Progress
) -> HostFile:
    """Graphs and the host's files, which need nothing of Qualcomm's."""
    context = min(target.shapes.context, checkpoint.config.max_positions)
    calls = {"prefill": min(target.shapes.prefill, context - 1), "decode": 1}
    steps = {}
    shared: dict[str, tuple[int, int]] = {}
    for name, tokens in calls.items():
        made = write_graph(checkpoint, target, tokens, context, progress)
        save_graph(made, folder / f"{name}.onnx", target, provenance, shared)
        steps[name] = _described(made, tokens)
    write_host_tables(checkpoint, context, folder / HOST)
    file = HostFile(
        context=context,
        htp_arch=target.qnn.htp_arch,
        soc_model=target.qnn.soc_model,
        provider=target.qnn.provider,
        steps=steps,
    )
    write_host_file(folder, file)
    return file


def model_of(made: StaticGraph, target: TargetProfile, provenance: dict[str, str]) -> ModelProto:
    """The graph as a model; inputs and outputs hold codes."""
    types = {8: onnx.TensorProto.UINT8, 16: onnx.TensorProto.UINT16}
    ends = [
        [helper.make_tensor_value_info(name, types[made.grids[name].bits], shape) for name, shape in side.items()]
        for side in (made.inputs, made.outputs)
    ]
    graph = helper.make_graph(made.graph.nodes, "decoder", *ends, initializer=list(made.graph.initializers.values()))
    imports = [helper.make_opsetid("", target.qnn.opset)]
    model = helper.make_model(
        graph, opset_imports=imports, ir_version=target.qnn.ir_version, producer_name="afq-export"
    )
    helper.set_model_props(model, provenance)
    return model


def save_graph(
    made: StaticGraph, path: Path, target: TargetProfile, provenance: dict[str, str], shared: dict[str, tuple[int, int]]
) -> None:
    """Writes a graph; its large tensors are appended to DATA beside it, unless `shared` has them (offset, length)."""
    model = model_of(made, target, provenance)
    with (path.parent / DATA).open("ab") as data:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) <= SMALL:
                continue
            if tensor.name not in shared:
                data.write(bytes(-data.tell() % 4096))
                shared[tensor.name] = data.tell(), len(tensor.raw_data)
                data.write(tensor.raw_data)
            offset, length = shared[tensor.name]
            onnx.external_data_helper.set_external_data(tensor, DATA, offset, length)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise VerdictError("the ONNX file is not valid", where=path.name, why=str(error)) from error


def write_host_tables(checkpoint: QuantizedCheckpoint, context: int, path: Path) -> None:
    """Token rows as the checkpoint has them, learned positions, cos and sin [context, d] (half of sin negated)."""
    embedding, config = checkpoint.embedding(), checkpoint.config
    tensors = {"embed_tokens.codes": embedding.codes.contiguous()}
    if embedding.scales is not None:
        tensors["embed_tokens.scales"] = embedding.scales.contiguous()
    if config.rope:
        cos, sin = rope_tables(config.rope, torch.arange(context))
        half = config.head_dim // 2
        tensors |= {"cos": cos.contiguous(), "sin": torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)}
    save_file(tensors, path)


def _described(made: StaticGraph, tokens: int) -> StepFile:
    def value(name: str, shape: tuple[int, ...]) -> ValueFile:
        grid = made.grids[name]
        return ValueFile(shape, grid.bits, grid.scale, grid.zero_point - grid.qmin)

    def values(shapes: dict[str, tuple[int, ...]]) -> dict[str, ValueFile]:
        return {name: value(name, shape) for name, shape in shapes.items()}

    return StepFile(tokens, values(made.inputs), values(made.outputs))


def write_step_vectors(folder: Path, vector: torch.Tensor) -> None:
    """vectors.safetensors: the inputs and outputs, as codes, of a prefill call and of the decode call that follows it,
    as the simulator computes them: `<program>.input.<name>`, `<program>.output.<name>`."""
    session = QnnSession(folder)
    tensors = {}
    for name, ids in (("prefill", vector[:-1]), ("decode", vector[-1:])):
        feed = session.feed(name, ids.numpy())
        found = session.run(name, feed)
        session.extend(ids, 0 if name == "prefill" else len(vector) - 1)
        tensors |= {f"{name}.input.{key}": codes for key, codes in feed.items()}
        tensors |= {f"{name}.output.{key}": codes for key, codes in found.items()}
    save_numpy({key: np.ascontiguousarray(codes) for key, codes in tensors.items()}, folder / "vectors.safetensors")
