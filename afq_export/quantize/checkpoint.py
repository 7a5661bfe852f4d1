"""QuantizedCheckpoint: integers, scales and float leftovers, independent of any runtime.

On disk: `model.safetensors` (codes int8 [O, I] unpacked, scales float32 [O, G], biases, norms, embedding) and
`quant.json` (configuration, specs, kernels, provenance). Reading back gives the same object to the bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.errors import InputError
from afq_export.spec.quant import LinearSpec, linear_name
from afq_export.spec.strict import Data

FORMAT = 1


class StaticRange(Data):
    """Per-tensor grid of an activation: `real = scale * (code - zero_point)`, int8 codes."""

    scale: float
    zero_point: int


class LinearRecord(Data):
    """What quant.json holds of a linear. `input`/`output`: static activation grids. `note`: why another grid was
    taken than the recipe's."""

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


@dataclasses.dataclass(frozen=True)
class QuantizedEmbedding:
    """Token rows: codes int8 [V, D] and scales float32 [V, G] (`bits` 4 or 8), or float rows (`bits` 32)."""

    bits: int
    group: int
    codes: Tensor
    scales: Tensor | None

    def dequantized(self) -> Tensor:
        """Float32 rows [V, D]."""
        if self.scales is None:
            return self.codes.float()
        return dequantize(self.codes, self.scales, self.group)


@dataclasses.dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized decoder, read lazily from `folder`. `digest` is the sha256 of its two files."""

    folder: Path
    config: DecoderConfig
    records: dict[str, LinearRecord]
    embedding_bits: int
    embedding_group: int
    provenance: dict
    digest: str

    def linear(self, name: str) -> QuantizedLinear:
        """The linear called `blocks.<i>.<role>` or `lm_head`."""
        tensors = self._tensors(f"{name}.")
        return QuantizedLinear(self.records[name], tensors["codes"], tensors["scales"], tensors.get("bias"))

    def block(self, index: int) -> dict[str, QuantizedLinear]:
        """The linears of block `index` by role."""
        roles = family(self.config).linear_shapes(self.config)
        return {role: self.linear(linear_name(index, role)) for role in roles}

    def block_floats(self, index: int) -> dict[str, Tensor]:
        """Float tensors of block `index`: norms, as `attn_norm.weight`."""
        return self._tensors(f"blocks.{index}.", floats=True)

    def embedding(self) -> QuantizedEmbedding:
        """Token rows."""
        tensors = self._tensors("embed_tokens.")
        return QuantizedEmbedding(
            self.embedding_bits, self.embedding_group, tensors["codes"], tensors.get("scales")
        )

    def embedding_floats(self) -> dict[str, Tensor]:
        """`embed_positions.weight` where the family has learned positions."""
        return self._tensors("embedding.", floats=True)

    def head_floats(self) -> dict[str, Tensor]:
        """`final_norm.weight` (and bias)."""
        return self._tensors("head.", floats=True)

    def names(self) -> Iterator[str]:
        """Names of all quantized linears, in the order in which they run."""
        yield from self.records

    def _tensors(self, prefix: str, floats: bool = False) -> dict[str, Tensor]:
        """Tensors under `prefix`, prefix removed; with `floats`, only those that no linear owns."""
        path = self.folder / "model.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key.startswith(prefix)]
                if floats:
                    keys = [key for key in keys if key.rsplit(".", 1)[0] not in self.records]
                return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise InputError("cannot read the quantized checkpoint", where=str(path), why=str(error)) from error


class QuantFile(Data):
    """The content of quant.json."""

    format: int
    config: dict
    linears: tuple[LinearRecord, ...]
    embedding_bits: int
    embedding_group: int
    provenance: dict
    tensors_sha256: str


def dequantize(codes_OI: Tensor, scales_OG: Tensor, group: int) -> Tensor:
    """`scale * code` in float32, the scale of each group of `group` columns (0: one group)."""
    if not group:
        return codes_OI.float() * scales_OG
    return codes_OI.float() * scales_OG.repeat_interleave(group, dim=1)[:, : codes_OI.shape[1]]


def open_checkpoint(folder: Path) -> QuantizedCheckpoint:
    """Opens a checkpoint written by `quantize`. Raises InputError when it is not one or its tensors were changed."""
    from afq_export.files import sha256_file

    path = folder / "quant.json"
    try:
        data = msgspec.json.decode(path.read_bytes(), type=QuantFile)
        config = DecoderConfig.from_dict(data.config)
    except OSError as error:
        raise InputError("no quantized checkpoint", where=str(folder), why=error.strerror or str(error)) from error
    except (msgspec.DecodeError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise InputError("quant.json does not fit", where=str(path), why=str(error)) from error
    if data.format != FORMAT:
        raise InputError("unknown format", where=str(path), why=f"format {data.format}, this version reads {FORMAT}")
    digest = sha256_file(folder / "model.safetensors")
    if digest != data.tensors_sha256:
        raise InputError("tensors changed", where=str(folder), why="model.safetensors is not what quant.json names")
    return QuantizedCheckpoint(
        folder=folder,
        config=config,
        records={record.spec.name: record for record in data.linears},
        embedding_bits=data.embedding_bits,
        embedding_group=data.embedding_group,
        provenance=data.provenance,
        digest=sha256_file(path),
    )
