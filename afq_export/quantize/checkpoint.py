"""QuantizedCheckpoint: integers, scales and float leftovers, independent of any runtime.

On disk: one `block-000.safetensors` per block and `outer.safetensors` (embedding, head), holding codes int8 [O, I]
unpacked, scales float32 [O, G], biases and norms; `quant.json` has configuration, grids, kernels, digests, provenance.
Reading back gives the same tensors to the bit, one block at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.errors import InputError
from afq_export.files import folder_beside, sha256_file, write_text
from afq_export.spec.quant import LinearSpec, linear_name
from afq_export.spec.recipe import FLOAT_CACHE, KvCache
from afq_export.spec.strict import Data

FORMAT = 1
OUTER = "outer.safetensors"


class StaticRange(Data, omit_defaults=True):
    """Per-tensor grid of an activation: `real = scale * (code - zero_point)`, signed codes of `bits` bits."""

    scale: float
    zero_point: int
    bits: int = 8

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1


class LinearRecord(Data):
    """What quant.json holds of a linear: its grids, the target's kernel, static activation grids.

    `note` says why another grid was taken than the recipe's, empty when none was.
    """

    spec: LinearSpec
    kernel: str
    input: StaticRange | None = None
    output: StaticRange | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """codes int8 [O, I], scales float32 [O, G], bias float32 [O] or None."""

    record: LinearRecord
    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    @property
    def spec(self) -> LinearSpec:
        return self.record.spec

    def dequantized(self) -> Tensor:
        """`scale * code`, float32 [O, I]."""
        return dequantize(self.codes, self.scales, self.spec.weight.group)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors under the names of the file."""
        named = {"codes": self.codes, "scales": self.scales, "bias": self.bias}
        return {f"{self.spec.name}.{key}": t.contiguous() for key, t in named.items() if t is not None}


@dataclasses.dataclass(frozen=True)
class QuantizedEmbedding:
    """Token rows: codes int8 [V, D] and scales float32 [V, G] (`bits` 4 or 8), or float rows in `codes` (`bits` 32)."""

    bits: int
    group: int
    codes: Tensor
    scales: Tensor | None

    def dequantized(self) -> Tensor:
        """Float32 rows [V, D]."""
        return self.codes.float() if self.scales is None else dequantize(self.codes, self.scales, self.group)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors under the names of the file."""
        named = {"embed_tokens.codes": self.codes, "embed_tokens.scales": self.scales}
        return {key: t.contiguous() for key, t in named.items() if t is not None}


class QuantFile(Data, omit_defaults=True):
    """The content of quant.json."""

    format: int
    config: DecoderConfig
    linears: tuple[LinearRecord, ...]
    embedding_bits: int
    embedding_group: int
    provenance: dict[str, Any]
    sha256: dict[str, str]
    tensors: dict[str, StaticRange] = {}
    kv_cache: KvCache | None = None


@dataclasses.dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized decoder, read lazily from `folder`. `digest` is the sha256 of quant.json, which names the others'.

    `tensors` are the grids of all tensors by name (arch/static.py), where the target keeps every one on a grid.
    """

    folder: Path
    config: DecoderConfig
    records: dict[str, LinearRecord]
    embedding_bits: int
    embedding_group: int
    provenance: dict[str, Any]
    digest: str
    tensors: dict[str, StaticRange] = dataclasses.field(default_factory=dict)
    kv_cache: KvCache = FLOAT_CACHE

    def block_tensors(self, index: int) -> dict[str, StaticRange]:
        """Grids of the tensors of block `index` by their name within it."""
        prefix = linear_name(index, "")
        return {name.removeprefix(prefix): grid for name, grid in self.tensors.items() if name.startswith(prefix)}

    def outer_tensors(self) -> dict[str, StaticRange]:
        """Grids of `hidden`, `final_norm` and `lm_head`."""
        return {name: grid for name, grid in self.tensors.items() if not name.startswith("blocks.")}

    def linear(self, name: str) -> QuantizedLinear:
        """The linear called `blocks.<i>.<role>` or `lm_head`."""
        record = self.records[name]
        file = OUTER if record.spec.block is None else _block_file(record.spec.block)
        tensors = self._read(file, f"{name}.")
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        expected = {"codes": (record.spec.outputs, record.spec.inputs)}
        expected["scales"] = (record.spec.outputs, record.spec.groups)
        if any(shapes.get(key) != shape for key, shape in expected.items()):
            why = f"{shapes}, expected {expected}"
            raise InputError("tensors that are not quant.json's", where=f"{self.folder / file}: {name}", why=why)
        return QuantizedLinear(record, tensors["codes"], tensors["scales"], tensors.get("bias"))

    def block(self, index: int) -> dict[str, QuantizedLinear]:
        """The linears of block `index` by role."""
        roles = family(self.config).linear_shapes(self.config)
        return {role: self.linear(linear_name(index, role)) for role in roles}

    def block_floats(self, index: int) -> dict[str, Tensor]:
        """Float tensors of block `index`: norms, as `attn_norm.weight`."""
        return self._read(_block_file(index), "float.")

    def embedding(self) -> QuantizedEmbedding:
        """Token rows."""
        tensors = self._read(OUTER, "embed_tokens.")
        return QuantizedEmbedding(self.embedding_bits, self.embedding_group, tensors["codes"], tensors.get("scales"))

    def embedding_floats(self) -> dict[str, Tensor]:
        """`embed_positions.weight` where the family has learned positions, else nothing."""
        return self._read(OUTER, "embedding.float.")

    def head_floats(self) -> dict[str, Tensor]:
        """`final_norm.weight` (and bias)."""
        return self._read(OUTER, "head.float.")

    def _read(self, file: str, prefix: str) -> dict[str, Tensor]:
        """Tensors of `file` under `prefix`, prefix removed."""
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as tensors:
                keys = [key for key in tensors.keys() if key.startswith(prefix)]
                return {key.removeprefix(prefix): tensors.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise InputError("cannot read the quantized checkpoint", where=str(path), why=str(error)) from error


@dataclasses.dataclass(frozen=True)
class QuantizedPart:
    """One file's content: linears in running order and float tensors by their full name in the file."""

    linears: tuple[QuantizedLinear, ...]
    floats: dict[str, Tensor]


def write_checkpoint(
    folder: Path,
    config: DecoderConfig,
    blocks: Iterable[QuantizedPart],
    embedding: QuantizedEmbedding,
    outer: QuantizedPart,
    provenance: dict[str, Any],
    tensors: dict[str, StaticRange] | None = None,
    kv_cache: KvCache = FLOAT_CACHE,
) -> QuantizedCheckpoint:
    """Writes a checkpoint to `folder`, whole or not at all, block by block, and opens it.

    Float names: `float.<role>.<kind>` in a block; `embedding.float.*` and `head.float.*` in `outer`.
    """
    with folder_beside(folder) as part_folder:
        records: list[LinearRecord] = []
        digests: dict[str, str] = {}

        def save(file: str, part: QuantizedPart, more: dict[str, Tensor]) -> None:
            tensors = more | {key: tensor.contiguous() for key, tensor in part.floats.items()}
            for linear in part.linears:
                tensors |= linear.tensors()
                records.append(linear.record)
            save_file(tensors, part_folder / file)
            digests[file] = sha256_file(part_folder / file)

        for index, block in enumerate(blocks):
            save(_block_file(index), block, {})
        save(OUTER, outer, embedding.tensors())
        content = QuantFile(
            FORMAT, config, tuple(records), embedding.bits, embedding.group, provenance, digests, tensors or {}
        )
        if kv_cache.quantized:  # files without it stay as they were
            content = msgspec.structs.replace(content, kv_cache=kv_cache)
        write_text(part_folder / "quant.json", msgspec.json.format(msgspec.json.encode(content)).decode() + "\n")
    return open_checkpoint(folder)


def open_checkpoint(folder: Path) -> QuantizedCheckpoint:
    """Opens a checkpoint written by `write_checkpoint`. Raises InputError when it is not one or a file was changed."""
    path = folder / "quant.json"
    try:
        data = msgspec.json.decode(path.read_bytes(), type=QuantFile)
    except OSError as error:
        raise InputError("no quantized checkpoint", where=str(folder), why=error.strerror or str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("quant.json does not fit", where=str(path), why=str(error)) from error
    if data.format != FORMAT:
        raise InputError("unknown format", where=str(path), why=f"format {data.format}, this version reads {FORMAT}")
    config = data.config
    if why := config.contradiction() or _contradiction(data):
        raise InputError("quant.json contradicts itself", where=str(path), why=why)
    expected = {_block_file(index) for index in range(config.layers)} | {OUTER}
    for file in sorted(expected):
        if not (folder / file).is_file():
            raise InputError("the quantized checkpoint is not complete", where=str(folder / file))
        if sha256_file(folder / file) != data.sha256.get(file):
            raise InputError("a file was changed", where=str(folder / file), why="its sha256 is not quant.json's")
    return QuantizedCheckpoint(
        folder=folder,
        config=config,
        records={record.spec.name: record for record in data.linears},
        embedding_bits=data.embedding_bits,
        embedding_group=data.embedding_group,
        provenance=data.provenance,
        digest=sha256_file(path),
        tensors=data.tensors,
        kv_cache=data.kv_cache or FLOAT_CACHE,
    )


def _contradiction(data: QuantFile) -> str:
    """Why the linears are not those of the configuration; empty when they are."""
    shapes = family(data.config).linear_shapes(data.config)
    inside = {linear_name(i, role): shape[:2] for i in range(data.config.layers) for role, shape in shapes.items()}
    expected = inside | {"lm_head": (data.config.vocab, data.config.hidden)}
    found = {record.spec.name: (record.spec.outputs, record.spec.inputs) for record in data.linears}
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    return f"{wrong[0]} is {found.get(wrong[0], 'absent')}, expected {expected.get(wrong[0], 'none')}" if wrong else ""


def dequantize(codes_OI: Tensor, scales_OG: Tensor, group: int) -> Tensor:
    """`scale * code` in float32, the scale of each group of `group` columns (0: one scale per row)."""
    if not group:
        return codes_OI.float() * scales_OG
    return codes_OI.float() * scales_OG.repeat_interleave(group, dim=1)[:, : codes_OI.shape[1]]


def _block_file(index: int) -> str:
    return f"block-{index:03d}.safetensors"
