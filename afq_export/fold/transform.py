"""SiteTransform: one invertible matrix (and shift) at one fold site, and how healthy it is."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from afq_export.spec.sites import Form


@dataclasses.dataclass(frozen=True)
class SiteTransform:
    """`x -> (x - shift) A^-1` on the site's producers and `W -> W A^T` on its consumers.

    `matrix` by form: DIAGONAL [dim] (the entries of A), PER_HEAD and ROPE_PAIRS [heads, d, d], PERMUTATION int64 [dim]
    (new position -> old position). `shift` [dim] or None. Float64 when saved; any float dtype while learned.
    `inverse` [heads, d, d] is given while learning (its graph is needed); None: computed where it is used.
    """

    form: Form
    matrix: Tensor
    shift: Tensor | None = None
    inverse: Tensor | None = None

    def inverted(self) -> Tensor:
        """A^-1 of a PER_HEAD or ROPE_PAIRS matrix [heads, d, d]."""
        return torch.linalg.inv(self.matrix) if self.inverse is None else self.inverse

    def detached(self) -> SiteTransform:
        """The same numbers without their graph, and without the inverse: what is saved."""
        shift = None if self.shift is None else self.shift.detach().clone()
        return SiteTransform(self.form, self.matrix.detach().clone(), shift)

    def to(self, dtype: torch.dtype) -> SiteTransform:
        """The same transform in another dtype; the inverse is dropped, to be computed in it."""
        matrix = self.matrix if self.form is Form.PERMUTATION else self.matrix.to(dtype)
        return SiteTransform(self.form, matrix, None if self.shift is None else self.shift.to(dtype))


def condition_number(transform: SiteTransform) -> float:
    """Largest 2-norm condition number among the site's matrices (1 for a permutation)."""
    if transform.form is Form.PERMUTATION:
        return 1.0
    matrix = transform.matrix.detach().double()
    if not bool(torch.isfinite(matrix).all()):
        return float("inf")
    if transform.form is Form.DIAGONAL:
        return float(matrix.abs().max() / matrix.abs().min())
    return float(torch.linalg.cond(matrix).max())


def dominance_margin(transform: SiteTransform) -> float:
    """Least (|a_ii| - sum_j |a_ij|) / |a_ii| over all rows: above 0 the matrix is strictly diagonally dominant, hence
    invertible (Levy-Desplanques; AffineQuant, arXiv 2403.12544, theorem 1). 1 for diagonals and permutations.

    A scaled rotation is invertible whatever its angle, so ROPE_PAIRS report 1 too.
    """
    if transform.form is not Form.PER_HEAD:
        return 1.0
    matrix = transform.matrix.detach().double().abs()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return float(((2 * diagonal - matrix.sum(-1)) / diagonal).min())
