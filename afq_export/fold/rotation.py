"""One orthogonal matrix on the residual stream, one on every head between v and o: the same function, other weights.

A norm without its gain commutes with an orthogonal Q: RMSNorm(x Q) = RMSNorm(x) Q for every Q, LayerNorm(x Q) =
LayerNorm(x) Q for every Q that leaves the vector of ones where it is. So gains go into the linears behind the norm, and
(row vectors, QuaRot, arXiv 2404.00456, section 4; SpinQuant, arXiv 2405.16406, R1 and R2)

    rows, positions    E' = E Q
    reads              W' = W diag(g) Q                          norm: gain' = 1, bias' = (bias / g) Q
    writes             W' = Q^T W           b' = b Q
    v, o               Wv'_k = H^T Wv_k     Wo'_h = Wo_h H       per head, bv'_k = bv_k H

LayerNorm's mean subtraction is absorbed too: rows and writes take P = I - 1 1^T / D besides, so that the stream has no
mean, in which nobody is interested, and on it LayerNorm is RMSNorm. In the D - 1 dimensions that are left Q is any
orthogonal matrix. One that takes the ones elsewhere would need an RMSNorm in the program and gains a choice of the
direction that the stream never has, nothing else; so ones stay, and every program keeps its operators.

What has outliers in a few channels has them spread over all, and costs nothing at run time. A head that was tied to the
rows no longer is: the gain of the last norm is in it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.arch.ops import hadamard_matrix
from afq_export.errors import InputError
from afq_export.load.checkpoint import DecoderWeights
from afq_export.spec.sites import SiteKind

Weights = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Orthogonal matrices, float64: `residual` [D, D] for the whole model, `heads` [L, d, d], one for each block."""

    residual: Tensor
    heads: Tensor


@dataclasses.dataclass(frozen=True)
class RotatedCheckpoint:
    """A DecoderWeights in another basis, rotated when read: in float64, cast once."""

    original: DecoderWeights
    rotation: Rotation

    @property
    def config(self) -> DecoderConfig:
        return dataclasses.replace(self.original.config, tied=False)

    @property
    def basis(self) -> Tensor:
        """What the residual stream of the original is multiplied by, [D, D]."""
        return written_basis(self.config, self.rotation.residual)

    def embedding(self, dtype: torch.dtype = torch.float32) -> Weights:
        turn = self.basis
        return {n: (t @ turn).to(dtype) for n, t in self.original.embedding(torch.float64).items()}

    def block(self, index: int, dtype: torch.dtype = torch.float32) -> Weights:
        weights = absorb_gains(self.config, self.original.block(index, torch.float64))
        weights = turn_block(self.config, weights, self.rotation.residual, self.rotation.heads[index])
        return {name: tensor.to(dtype) for name, tensor in weights.items()}

    def head(self, dtype: torch.dtype = torch.float32) -> Weights:
        weights = _absorb(self.original.head(torch.float64), "final_norm", ("lm_head",))
        weights = _read(weights, "final_norm", ("lm_head",), self.rotation.residual)
        return {name: tensor.to(dtype) for name, tensor in weights.items()}


def rotate(model: DecoderWeights, kind: str, seed: int, learned: Rotation | None = None) -> DecoderWeights:
    """`model` as the recipe's `transforms.rotation` wants it: itself for `off`, else turned, at random by `seed` or as
    `learned` says. Raises InputError when it is to be learned and nothing has been."""
    if kind == "off":
        return model
    if kind == "learned" and learned is None:
        raise InputError(
            "no rotation yet",
            where="transforms.rotation = 'learned'",
            why="it is learned in a run's calibration, and there is none here",
            do="take transforms.rotation = 'hadamard'",
        )
    return RotatedCheckpoint(model, learned or random_rotation(model.config, seed))


def random_rotation(config: DecoderConfig, seed: int) -> Rotation:
    """A random Hadamard matrix for the residual stream (OPT: one that fixes the ones), one for all heads."""
    generator = torch.Generator().manual_seed(seed)
    residual = (fixing_ones if fixes_ones(config) else hadamard)(config.hidden, generator)
    return Rotation(residual, hadamard(config.head_dim, generator).expand(config.layers, -1, -1))


def fixes_ones(config: DecoderConfig) -> bool:
    """Whether the norms take the mean out, so that the vector of ones must stay where it is."""
    return config.family == "opt"


def written_basis(config: DecoderConfig, residual: Tensor) -> Tensor:
    """What is written to the stream is multiplied by: `residual`, without the mean where the norms take it out."""
    return residual - residual.mean(1, keepdim=True) if fixes_ones(config) else residual


def absorb_gains(config: DecoderConfig, w: Weights) -> Weights:
    """A block with the gains of its norms in the linears behind them: `W diag(g)`, gain 1, `bias / g`."""
    for site in family(config).fold_sites(config):
        if site.kind is SiteKind.NORM_TO_LINEARS:
            w = _absorb(w, site.producers[0], site.consumers)
    return w


def turn_block(
    config: DecoderConfig, w: Weights, residual: Tensor, head: Tensor, written: Tensor | None = None
) -> Weights:
    """A block without gains in another basis. Differentiable, in any float dtype: rotations are learned through it.

    `written`: the columns of `written_basis` that the writing linears' outputs are wanted for; None: all.
    """
    arch, columns = family(config), written_basis(config, residual) if written is None else written
    for site in arch.fold_sites(config):
        if site.kind is SiteKind.NORM_TO_LINEARS:
            w = _read(w, site.producers[0], site.consumers, residual)
    for role in arch.WRITERS:
        w = w | {f"{role}.weight": columns.T @ w[f"{role}.weight"]}
        w |= {f"{role}.bias": w[f"{role}.bias"] @ columns} if f"{role}.bias" in w else {}
    return _turn_heads(w, head)


def _absorb(w: Weights, norm: str, consumers: tuple[str, ...]) -> Weights:
    gain, bias = w[f"{norm}.weight"], w.get(f"{norm}.bias")
    new = {f"{role}.weight": w[f"{role}.weight"] * gain for role in consumers}
    new[f"{norm}.weight"] = torch.ones_like(gain)
    if bias is not None:
        if bool((gain == 0).any()):
            raise InputError("no rotation", where=norm, why="a gain of 0 leaves its bias no place to go")
        new[f"{norm}.bias"] = bias / gain
    return w | new


def _read(w: Weights, norm: str, consumers: tuple[str, ...], residual: Tensor) -> Weights:
    keys = [f"{role}.weight" for role in consumers] + [f"{norm}.bias"]
    return w | {key: w[key] @ residual for key in keys if key in w}


def _turn_heads(w: Weights, head: Tensor) -> Weights:
    """v and o: every KV head of v, every query head of o."""
    d, v, o = len(head), w["v_proj.weight"], w["o_proj.weight"]
    new = {
        "v_proj.weight": (head.T @ v.view(-1, d, v.shape[1])).reshape(v.shape),
        "o_proj.weight": (o.view(len(o), -1, d) @ head).reshape(o.shape),
    }
    return w | new | ({"v_proj.bias": (w["v_proj.bias"].view(-1, d) @ head).flatten()} if "v_proj.bias" in w else {})


def hadamard(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [n, n], float64, all of whose entries are small: signs times Sylvester's Hadamard matrix of
    the largest power of two in n, and a random orthogonal one for the odd rest."""
    rest = size & -size
    matrix = torch.kron(hadamard_matrix(rest, torch.float64), orthogonal(size // rest, generator))
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
