"""One orthogonal matrix on the residual stream, one on every head between v and o: the same function, other weights.

A norm without its gain commutes with an orthogonal Q: RMSNorm(x Q) = RMSNorm(x) Q for every Q, LayerNorm(x Q) =
LayerNorm(x) Q for every Q that leaves the vector of ones where it is. So gains go into the linears behind the norm, and
(row vectors, QuaRot, arXiv 2404.00456, section 4; SpinQuant, arXiv 2405.16406, R1 and R2)

    rows, positions    E' = E Q
    reads              W' = W diag(g) Q                          norm: gain' = 1, bias' = (bias / g) Q
    writes             W' = Q^T W           b' = b Q
    v, o               Wv'_k = H^T Wv_k     Wo'_h = Wo_h H       per head, bv'_k = bv_k H

What has outliers in a few channels has them spread over all, and costs nothing at run time. A head that was tied to the
rows no longer is: the gain of the last norm is in it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.errors import InputError
from afq_export.load.checkpoint import DecoderWeights
from afq_export.spec.sites import SiteKind

Weights = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class RotatedCheckpoint:
    """A DecoderWeights in another basis, rotated when read: in float64, cast once. `residual` [D, D], `head` [d, d]."""

    original: DecoderWeights
    residual: Tensor
    head_rotation: Tensor

    @property
    def config(self) -> DecoderConfig:
        return dataclasses.replace(self.original.config, tied=False)

    def embedding(self, dtype: torch.dtype = torch.float32) -> Weights:
        return {n: (t @ self.residual).to(dtype) for n, t in self.original.embedding(torch.float64).items()}

    def block(self, index: int, dtype: torch.dtype = torch.float32) -> Weights:
        weights, arch = self.original.block(index, torch.float64), family(self.config)
        for site in arch.fold_sites(self.config):
            if site.kind is SiteKind.NORM_TO_LINEARS:
                weights |= self._read(site.producers[0], site.consumers, weights)
        for role in arch.WRITERS:
            weights |= self._write(role, weights)
        weights |= self._heads(weights)
        return {name: tensor.to(dtype) for name, tensor in weights.items()}

    def head(self, dtype: torch.dtype = torch.float32) -> Weights:
        weights = self.original.head(torch.float64)
        weights |= self._read("final_norm", ("lm_head",), weights)
        return {name: tensor.to(dtype) for name, tensor in weights.items()}

    def _read(self, norm: str, consumers: tuple[str, ...], w: Weights) -> Weights:
        gain, bias = w[f"{norm}.weight"], w.get(f"{norm}.bias")
        new = {f"{role}.weight": (w[f"{role}.weight"] * gain) @ self.residual for role in consumers}
        new[f"{norm}.weight"] = torch.ones_like(gain)
        if bias is not None:
            if bool((gain == 0).any()):
                raise InputError("no rotation", where=norm, why="a gain of 0 leaves its bias no place to go")
            new[f"{norm}.bias"] = (bias / gain) @ self.residual
        return new

    def _write(self, role: str, w: Weights) -> Weights:
        new = {f"{role}.weight": self.residual.T @ w[f"{role}.weight"]}
        return new | ({f"{role}.bias": w[f"{role}.bias"] @ self.residual} if f"{role}.bias" in w else {})

    def _heads(self, w: Weights) -> Weights:
        """v and o: every KV head of v, every query head of o."""
        turn, d = self.head_rotation, self.config.head_dim
        v, o = w["v_proj.weight"], w["o_proj.weight"]
        new = {
            "v_proj.weight": (turn.T @ v.view(-1, d, v.shape[1])).reshape(v.shape),
            "o_proj.weight": (o.view(len(o), -1, d) @ turn).reshape(o.shape),
        }
        return new | ({"v_proj.bias": (w["v_proj.bias"].view(-1, d) @ turn).flatten()} if "v_proj.bias" in w else {})


def rotate(model: DecoderWeights, kind: str, seed: int) -> DecoderWeights:
    """`model` as the recipe's `transforms.rotation` wants it: itself for `off`, else rotated at random by `seed`."""
    if kind == "off":
        return model
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    make = fixing_ones if config.family == "opt" else hadamard
    return RotatedCheckpoint(model, make(config.hidden, generator), hadamard(config.head_dim, generator))


def hadamard(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [n, n], float64, all of whose entries are small: signs times Sylvester's Hadamard matrix of
    the largest power of two in n, and a random orthogonal one for the odd rest."""
    rest = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < rest:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0) / 2**0.5
    matrix = torch.kron(matrix, orthogonal(size // rest, generator))
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix


def fixing_ones(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [n, n], float64, that maps the vector of ones to itself, as LayerNorm's mean needs.

    A reflection takes the first axis to the ones; around that axis anything may turn.
    """
    axis = torch.full((size,), size**-0.5, dtype=torch.float64)
    axis[0] -= 1
    mirror = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(axis, axis) / axis.square().sum().clamp_min(1e-300)
    turn = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), orthogonal(size - 1, generator))
    return mirror @ turn @ mirror


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [n, n], float64, uniform (QR of a Gaussian, signs of R's diagonal taken out)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).contiguous()
