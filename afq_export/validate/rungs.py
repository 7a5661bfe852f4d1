"""The decoder on each rung of the ladder: the same family functions, other `Ops`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.arch import decoder
from afq_export.arch.attention import apply_rope, causal_attention
from afq_export.arch.config import DecoderConfig
from afq_export.arch.ops import FloatOps, Ops, PlainSums, Weights, activate, block_hadamard
from afq_export.arch.static import StaticOps
from afq_export.load.checkpoint import DecoderWeights
from afq_export.quantize.activations import (
    dequantize_static,
    fake_quantize_static,
    quantize_dynamic,
    quantize_static,
    scaled_static,
    unrounded,
)
from afq_export.quantize.cache import cached
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.quantize.tensors import Grids, on_constant_grids, visit_grids
from afq_export.spec.target import TargetProfile
from afq_export.validate.integer.linear import integer_linear


class FloatParts(Protocol):
    """How what lies between the integer linears is computed; `name` is `torch` or that of the runtime it is taken from.

    Elementwise products and sums need no entry: IEEE float32 leaves them no choice. Rotary embedding has one because a
    runtime may fuse its product and sum.
    """

    @property
    def name(self) -> str: ...

    def linear(self, linear: QuantizedLinear, x: Tensor) -> Tensor | None:
        """The runtime's own kernel, run alone, for a linear whose float sums have an order that no model follows (its
        target allows an error, and layers.py measures it); None: the integer model is exact."""

    def rotate(self, x_BTHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """`x` turned by cos and sin [T, d]."""

    def norm(self, config: DecoderConfig, weights: Weights, role: str, x: Tensor) -> Tensor:
        """RMSNorm or LayerNorm over the last dimension, weights included."""

    def activation(self, config: DecoderConfig, x: Tensor) -> Tensor:
        """The MLP's nonlinearity."""

    def hadamard(self, x: Tensor, size: int) -> Tensor:
        """`x` [B, T, n] times Hadamard matrices of `size`; only programs of targets with `online` have them."""

    def attention(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Causal attention [B, T, H, d] of whole sequences."""


class TorchParts:
    """torch, in the dtype of its input."""

    name = "torch"

    def linear(self, linear: QuantizedLinear, x: Tensor) -> Tensor | None:
        return None

    def rotate(self, x_BTHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return apply_rope(x_BTHd, *rope)

    def norm(self, config: DecoderConfig, weights: Weights, role: str, x: Tensor) -> Tensor:
        return FloatOps(config, weights).norm(role, x)

    def activation(self, config: DecoderConfig, x: Tensor) -> Tensor:
        return activate(config.activation, x)

    def hadamard(self, x: Tensor, size: int) -> Tensor:
        return block_hadamard(x, size)

    def attention(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        return causal_attention(q_BTHd, k_BTKd, v_BTKd)


class ComparedParts:
    """`parts`, each result held against torch's; `error` is the largest difference over the row's largest value.

    `own` are the linears for which the runtime's kernel stood in: layers.py holds those to the integer model.
    """

    def __init__(self, parts: FloatParts) -> None:
        self.parts, self.name, self.reference, self.error = parts, parts.name, TorchParts(), 0.0
        self.own: set[str] = set()

    def linear(self, linear: QuantizedLinear, x: Tensor) -> Tensor | None:
        y = self.parts.linear(linear, x)
        if y is not None:
            self.own.add(linear.spec.name)
        return y

    def rotate(self, x_BTHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return self._compare(self.parts.rotate(x_BTHd, rope), self.reference.rotate(x_BTHd, rope))

    def norm(self, config: DecoderConfig, weights: Weights, role: str, x: Tensor) -> Tensor:
        return self._compare(self.parts.norm(config, weights, role, x), self.reference.norm(config, weights, role, x))

    def activation(self, config: DecoderConfig, x: Tensor) -> Tensor:
        return self._compare(self.parts.activation(config, x), self.reference.activation(config, x))

    def hadamard(self, x: Tensor, size: int) -> Tensor:
        return self._compare(self.parts.hadamard(x, size), self.reference.hadamard(x, size))

    def attention(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        return self._compare(
            self.parts.attention(q_BTHd, k_BTKd, v_BTKd), self.reference.attention(q_BTHd, k_BTKd, v_BTKd)
        )

    def _compare(self, ours: Tensor, theirs: Tensor) -> Tensor:
        size = theirs.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        error = float(((ours - theirs).abs() / size).max())
        self.error = max(self.error, error) if error == error else float("inf")
        return ours


class Rung(Protocol):
    """A decoder that is read one block at a time. What `block` and `head` return is dropped after use."""

    @property
    def config(self) -> DecoderConfig: ...

    def embed(self, ids_NT: Tensor) -> Tensor:
        """Hidden states [N, T, D] before the first block."""

    def block(self, index: int) -> Ops:
        """The operations of block `index`."""

    def head(self) -> Ops:
        """`final_norm` and `lm_head`."""

    def attend(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Causal attention [B, T, H, d]."""


def run_block(rung: Rung, ops: Ops, x_BTD: Tensor) -> Tensor:
    """One block of `rung` over whole sequences, [B, T, D]."""
    return decoder.run_block(rung.config, ops, x_BTD, rung.attend)


@dataclasses.dataclass(frozen=True)
class FloatRung:
    """Plain floating point: the model as it came, or folded. `dtype` float64 for the fold check."""

    weights: DecoderWeights
    dtype: torch.dtype = torch.float32

    @property
    def config(self) -> DecoderConfig:
        return self.weights.config

    def embed(self, ids_NT: Tensor) -> Tensor:
        return decoder.embed(self.config, self.weights.embedding(self.dtype), ids_NT)

    def block(self, index: int) -> Ops:
        return FloatOps(self.config, self.weights.block(index, self.dtype))

    def head(self) -> Ops:
        return FloatOps(self.config, self.weights.head(self.dtype))

    def attend(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        return causal_attention(q_BTHd, k_BTKd, v_BTKd)


class FakeQuantOps(PlainSums):
    """Dequantized codes times fake-quantized activations, a float32 matmul: what training and calibration see."""

    def __init__(self, config: DecoderConfig, linears: Mapping[str, QuantizedLinear], floats: Weights) -> None:
        self.float_ops, self.linears = FloatOps(config, floats), linears

    def linear(self, role: str, x: Tensor) -> Tensor:
        linear = self.linears[role]
        record = linear.record
        y = F.linear(fake_quantized(linear, x), linear.dequantized(), linear.bias)
        return y if record.output is None else dequantize_static(quantize_static(y, record.output), record.output)

    def norm(self, role: str, x: Tensor) -> Tensor:
        return self.float_ops.norm(role, x)

    def rotate(self, x_BTHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return self.float_ops.rotate(x_BTHd, rope)

    def activation(self, x: Tensor) -> Tensor:
        return self.float_ops.activation(x)

    def hadamard(self, x: Tensor, size: int) -> Tensor:
        return self.float_ops.hadamard(x, size)


class IntegerOps(PlainSums):
    """The target's integer kernels, exactly; what lies between them as `parts` computes it."""

    def __init__(
        self,
        config: DecoderConfig,
        linears: Mapping[str, QuantizedLinear],
        floats: Weights,
        arithmetics: Mapping[str, str],
        parts: FloatParts,
    ) -> None:
        """`arithmetics`: kernel name -> `Kernel.arithmetic`."""
        self.config, self.linears, self.floats = config, linears, floats
        self.arithmetics, self.parts = arithmetics, parts

    def linear(self, role: str, x: Tensor) -> Tensor:
        linear = self.linears[role]
        y = self.parts.linear(linear, x.float())
        if y is None:
            y = integer_linear(self.arithmetics[linear.record.kernel], linear, x.float())
        return y.to(x.dtype)

    def norm(self, role: str, x: Tensor) -> Tensor:
        return self.parts.norm(self.config, self.floats, role, x)

    def rotate(self, x_BTHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return self.parts.rotate(x_BTHd, rope)

    def activation(self, x: Tensor) -> Tensor:
        return self.parts.activation(self.config, x)

    def hadamard(self, x: Tensor, size: int) -> Tensor:
        return self.parts.hadamard(x, size)


class ObservedOps:
    """Passes everything on to `ops` and shows the input of every linear to `observe(role, x)`."""

    def __init__(self, ops: Ops, observe: Callable[[str, Tensor], None]) -> None:
        self.ops, self.observe = ops, observe

    def linear(self, role: str, x: Tensor) -> Tensor:
        self.observe(role, x)
        return self.ops.linear(role, x)

    def norm(self, role: str, x: Tensor) -> Tensor:
        return self.ops.norm(role, x)

    def rotate(self, x_BTHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return self.ops.rotate(x_BTHd, rope)

    def activation(self, x: Tensor) -> Tensor:
        return self.ops.activation(x)

    def hadamard(self, x: Tensor, size: int) -> Tensor:
        return self.ops.hadamard(x, size)

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self.ops.add(name, x, y)

    def multiply(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self.ops.multiply(name, x, y)

    @property
    def attend(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """That of `ops`, when they have one."""
        return self.ops.attend


@dataclasses.dataclass(frozen=True)
class QuantizedRung:
    """A quantized checkpoint under one kind of Ops. `dtype` is that of what is not a quantized linear."""

    checkpoint: QuantizedCheckpoint
    make_ops: Callable[[Mapping[str, QuantizedLinear], Weights], Ops]
    dtype: torch.dtype = torch.float32
    parts: FloatParts = dataclasses.field(default_factory=TorchParts)

    @property
    def config(self) -> DecoderConfig:
        return self.checkpoint.config

    def embed(self, ids_NT: Tensor) -> Tensor:
        rows = {"embed_tokens.weight": self.checkpoint.embedding().dequantized()}
        x_NTD = decoder.embed(self.config, self._cast(rows | self.checkpoint.embedding_floats()), ids_NT)
        grids = self.checkpoint.tensors
        return fake_quantize_static(x_NTD, grids["hidden"]) if grids else x_NTD

    def block(self, index: int) -> Ops:
        floats, grids = self.checkpoint.block_floats(index), self.checkpoint.block_tensors(index)
        return self._ops(self.checkpoint.block(index), floats, grids)

    def head(self) -> Ops:
        lm_head = {"lm_head": self.checkpoint.linear("lm_head")}
        return self._ops(lm_head, self.checkpoint.head_floats(), self.checkpoint.outer_tensors())

    def _ops(self, linears: Mapping[str, QuantizedLinear], floats: Weights, grids: Grids) -> Ops:
        """`make_ops`, and around it every tensor's grid where the target keeps all of them on one."""
        if not grids:
            return self.make_ops(linears, self._cast(floats))
        bits = max(grid.bits for grid in grids.values())
        ops = self.make_ops(linears, self._cast(on_constant_grids(floats, bits)))
        return StaticOps(self.config, ops, visit_grids(grids))

    def attend(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Over keys and values as the cache holds them: a program reads all of them back, those of this call too."""
        keys, values = (cached(x, self.checkpoint.kv_cache) for x in (k_BTKd, v_BTKd))
        return self.parts.attention(q_BTHd, keys, values)

    def _cast(self, floats: Weights) -> Weights:
        return {name: tensor.to(self.dtype) for name, tensor in floats.items()}


def fake_quant_rung(checkpoint: QuantizedCheckpoint) -> QuantizedRung:
    """The checkpoint as fake quantization computes it."""
    return QuantizedRung(checkpoint, lambda linears, floats: FakeQuantOps(checkpoint.config, linears, floats))


def integer_rung(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    dtype: torch.dtype = torch.float32,
    parts: FloatParts | None = None,
) -> QuantizedRung:
    """The checkpoint as the target's kernels compute it, torch between them unless `parts` says otherwise."""
    between = parts or TorchParts()
    arithmetics = {kernel.name: kernel.arithmetic for kernel in target.kernels}
    return QuantizedRung(
        checkpoint,
        lambda linears, floats: IntegerOps(checkpoint.config, linears, floats, arithmetics, between),
        dtype,
        between,
    )


def fake_quantized(linear: QuantizedLinear, x: Tensor) -> Tensor:
    """`x` through the int8 grid of the linear's input, back in float32; `x` itself when its activations are float."""
    if linear.spec.activation is None:
        return x
    if linear.record.input is not None:
        return dequantize_static(quantize_static(x, linear.record.input), linear.record.input)
    return quantize_dynamic(x, linear.spec.activation).dequantized()


def unrounded_codes(linear: QuantizedLinear, x_TI: Tensor) -> Tensor:
    """What the kernel rounds to integers in its input, one row per token; nothing, [T, 0], when it stays float."""
    if linear.spec.activation is None:
        return x_TI[:, :0]
    if linear.record.input is not None:
        return scaled_static(x_TI, linear.record.input)
    return unrounded(x_TI, linear.spec.activation)
