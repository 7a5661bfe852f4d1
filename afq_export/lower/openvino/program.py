"""From a quantized checkpoint to an OpenVINO program, saved and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from afq_export.errors import VerdictError
from afq_export.lower.onnx.decoder import rotary_tables
from afq_export.lower.onnx.program import context_length
from afq_export.lower.openvino.decoder import EMBEDDING, write_decoder
from afq_export.lower.openvino.readback import OpenvinoContent, read_program
from afq_export.lower.stored import StoredLinear, difference
from afq_export.progress import Progress
from afq_export.quantize.assign import session_options
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.runtime.openvino import require_openvino
from afq_export.spec.target import TargetProfile

MODEL = "openvino_model.xml"
"""The name that optimum-intel and OpenVINO GenAI look for."""


def lower_openvino(
    checkpoint: QuantizedCheckpoint, target: TargetProfile, folder: Path, provenance: dict[str, str], progress: Progress
) -> OpenvinoContent:
    """Writes openvino_model.xml and .bin to `folder` and gives what was read back from them.

    Raises InputError for what OpenVINO does not take, VerdictError when the finished file is not the checkpoint.
    """
    model = write_decoder(checkpoint, target, context_length(checkpoint, target), progress)
    for key, value in session_options(checkpoint.records, target).items():
        model.set_rt_info(value, ["runtime_options", key])
    for key, value in provenance.items():
        model.set_rt_info(value, ["afq_export", key])
    # The default stores float32 constants as float16.
    require_openvino().save_model(model, folder / MODEL, compress_to_fp16=False)
    del model
    content = read_program(folder / MODEL)
    verify(checkpoint, target, content)
    steps = checkpoint.config.layers + 2
    progress("lower", steps, steps)
    return content


def verify(checkpoint: QuantizedCheckpoint, target: TargetProfile, content: OpenvinoContent) -> None:
    """Raises VerdictError naming the first linear, or else tensor or property, that the file lacks or has otherwise."""
    for name in checkpoint.records:
        found = content.linears.get(name)
        wrong = "it is not there" if found is None else difference(_expected(checkpoint.linear(name), target), found)
        if wrong:
            raise VerdictError("the file is not the checkpoint", where=name, why=wrong)
    if len(content.linears) != len(checkpoint.records):
        more = next(name for name in content.linears if name not in checkpoint.records)
        raise VerdictError("the file has linears of its own", where=more)
    rows = checkpoint.embedding()
    if rows.scales is not None:
        expected = _stored(rows.codes.numpy(), rows.scales.float().numpy(), rows.bits, rows.group)
        wrong = "they are not quantized" if content.rows is None else difference(expected, content.rows)
        if wrong:
            raise VerdictError("the file is not the checkpoint", where=EMBEDDING, why=wrong)
    for name, array in _others(checkpoint, target).items():
        if name not in content.tensors or not np.array_equal(content.tensors[name], array):
            raise VerdictError("the file is not the checkpoint", where=name, why="its numbers are not there")
    if content.properties != session_options(checkpoint.records, target):
        raise VerdictError("the file's properties are not the target's", where=MODEL, why=str(content.properties))


def _expected(linear: QuantizedLinear, target: TargetProfile) -> StoredLinear:
    """What the file must hold of a linear."""
    bits, group = target.kernel(linear.record.kernel).stored_bits, linear.spec.weight.group
    bias = None if linear.bias is None else linear.bias.float().numpy()
    return _stored(linear.codes.numpy(), linear.scales.float().numpy(), bits, group, bias)


def _stored(
    codes: np.ndarray, scales: np.ndarray, bits: int, group: int, bias: np.ndarray | None = None
) -> StoredLinear:
    return StoredLinear(f"int{bits} {f'g{group}' if group else 'per_channel'}", codes, scales, bias)


def _others(checkpoint: QuantizedCheckpoint, target: TargetProfile) -> dict[str, np.ndarray]:
    """Name and values of float token rows, norms, learned positions and rotary tables."""
    config, rows = checkpoint.config, checkpoint.embedding()
    found = {} if rows.scales is not None else {f"{EMBEDDING}.weight": rows.codes.float().numpy()}
    found |= {name: tensor.float().numpy() for name, tensor in checkpoint.embedding_floats().items()}
    if config.rope:
        found |= rotary_tables(config, context_length(checkpoint, target))
    for index in range(config.layers):
        found |= {f"blocks.{index}.{n}": t.float().numpy() for n, t in checkpoint.block_floats(index).items()}
    return found | {f"head.{name}": tensor.float().numpy() for name, tensor in checkpoint.head_floats().items()}
