"""Tensors of a GGUF file, dequantized one at a time, under their Hugging Face names.

llama.cpp stores the rows of q and k in interleaved RoPE order for the `llama` architecture; they are put back into
the half-rotated order of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import _type_traits, dequantize
from torch import Tensor

from afq_export.arch.config import DecoderConfig, Rope
from afq_export.errors import InputError

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
"""Divides the rotary frequencies: how llama.cpp stores the RoPE scaling of Llama 3.1 and later."""


_PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
_READABLE = frozenset((*_PLAIN, *_type_traits))


class GgufSource:
    """A TensorSource over a GGUF file (memory-mapped)."""

    def __init__(self, path: Path, config: DecoderConfig) -> None:
        """Raises InputError when the file is not GGUF, is truncated, or holds tensors that no name is known for."""
        self._config = config
        self.paths = [path]
        try:
            reader = GGUFReader(path)
            tensors = {tensor.name: tensor for tensor in reader.tensors}
            fields = {key: field.contents() for key, field in reader.fields.items() if ".rope." in key}
            architecture = reader.fields["general.architecture"].contents()
        except Exception as error:  # the reader raises whatever numpy or struct does on a broken file
            raise InputError("cannot read GGUF", where=str(path), why=str(error) or type(error).__name__) from error
        self._permuted = architecture == "llama"
        self._factors = tensors.pop(ROPE_FACTORS, None)
        self._scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
        self._factor = float(fields.get(f"{architecture}.rope.scaling.factor", 1.0))
        self._tensors = {_name(name, path): tensor for name, tensor in tensors.items()}
        for tensor in self._tensors.values():
            if tensor.tensor_type not in _READABLE:
                raise InputError("a GGUF type that cannot be dequantized", where=f"{path}: {tensor.name}")

    def rope(self, rope: Rope) -> Rope:
        """`rope` with the scaling that the file states besides its base. Raises InputError for an unknown one."""
        frequencies = np.asarray(rope.inv_freq, np.float32)
        if self._factors is not None:
            frequencies = frequencies / np.asarray(self._factors.data, np.float32).reshape(-1)
        elif self._scaling == "linear":
            frequencies = frequencies / np.float32(self._factor)
        elif self._scaling != "none":
            raise InputError("RoPE scaling not supported in GGUF", where=str(self.paths[0]), why=str(self._scaling))
        return Rope(tuple(frequencies.tolist()), rope.attention_factor)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {key: tuple(int(n) for n in reversed(tensor.shape)) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        if self._permuted and key.endswith(("q_proj.weight", "q_proj.bias")):
            values = _half_rotated(values, self._config.heads)
        elif self._permuted and key.endswith(("k_proj.weight", "k_proj.bias")):
            values = _half_rotated(values, self._config.kv_heads)
        return torch.from_numpy(np.ascontiguousarray(values))


def _name(name: str, path: Path) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
    raise InputError("unknown tensor in GGUF", where=f"{path}: {name}", why="no place for it in the supported families")


def _half_rotated(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (0, 1, 2, 3, ...) of each head -> (0, 2, 4, ..., 1, 3, 5, ...)."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
