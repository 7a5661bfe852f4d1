"""What is learned in a block: one transform per chosen site and one clipping factor per weight group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from afq_export.calibrate.mask import gradual_mask
from afq_export.fold.forms import SiteChoice
from afq_export.fold.transform import SiteTransform
from afq_export.spec.sites import Form

UNCLIPPED = 4.0
"""First logit of a clipping factor: sigmoid(4) = 0.98 (OmniQuant, arXiv 2308.13137, section 3.2)."""

WELL_CONDITIONED = 1e3
"""Up to this condition number a float32 inverse has some four digits; above it the inverse is taken in float64."""


class SiteParameters(nn.Module):
    """The learned parameters of one site.

    The paper learns A itself, from a diagonal start. Here A = diag(exp(l)) (I + M * GM): the same matrices, but the
    diagonal cannot change sign or vanish, and diagonal dominance, sum_j |M_ij GM_ij| < 1, no longer depends on the
    scale of a row. With RoPE A is a rotation by `angle` times exp(l) for every frequency pair.
    """

    def __init__(self, choice: SiteChoice, start: Tensor, shift: Tensor | None) -> None:
        """`start` [dim]: positive diagonal, or the order of a PERMUTATION. `shift` [dim] when the site learns one."""
        super().__init__()
        self.site, self.form = choice.site, choice.form
        heads, d = self.site.heads, self.site.head_dim
        self._made: tuple[tuple[float, float, torch.dtype], Tensor, Tensor] | None = None
        self.shift = None if shift is None else nn.Parameter(shift.clone())
        if self.form is Form.PERMUTATION:
            self.register_buffer("order", start)
        elif self.form is Form.ROPE_PAIRS:
            self.log_scale = nn.Parameter(start.new_zeros(heads, d // 2))
            self.angle = nn.Parameter(start.new_zeros(heads, d // 2))
        else:
            self.log_diagonal = nn.Parameter(start.log())
            if self.form is Form.PER_HEAD:
                self.off_diagonal = nn.Parameter(start.new_zeros(heads, d, d))

    def transform(self, opened: float, stability_factor: float, dtype: torch.dtype = torch.float32) -> SiteTransform:
        """The masked transform, as it is used, folded and saved. `opened`: how far the gradual mask is open."""
        shift = None if self.shift is None else self.shift.to(dtype)
        if self.form is Form.PERMUTATION:
            return SiteTransform(self.form, self.order)
        if self.form is Form.ROPE_PAIRS:
            matrix = _rotations(self.log_scale.to(dtype).exp(), self.angle.to(dtype))
            inverse = _rotations((-self.log_scale.to(dtype)).exp(), -self.angle.to(dtype))
            return SiteTransform(self.form, matrix, shift, inverse)
        diagonal = self.log_diagonal.to(dtype).exp()
        if self.form is Form.DIAGONAL:
            return SiteTransform(self.form, diagonal, shift)
        d = self.site.head_dim
        mask, one = self._mask(opened, stability_factor, dtype)
        mixed = one + self.off_diagonal.to(dtype) * mask
        rows = diagonal.view(self.site.heads, d)
        inverse = _inverse(mixed) / rows[:, None, :]
        return SiteTransform(self.form, rows[:, :, None] * mixed, shift, inverse)

    def _mask(self, opened: float, stability_factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The gradual mask [d, d] without its diagonal, and the identity; made when the mask has changed."""
        key = opened, stability_factor, dtype
        if self._made is None or self._made[0] != key:
            d, device = self.site.head_dim, self.off_diagonal.device
            mask = gradual_mask(d, opened, stability_factor, device).to(dtype).fill_diagonal_(0.0)
            self._made = key, mask, torch.eye(d, dtype=dtype, device=device)
        return self._made[1:]


class BlockParameters(nn.Module):
    """All sites of a block and the clipping logits [O, G] of its linears."""

    def __init__(self, sites: Sequence[SiteParameters], clip_logits: Mapping[str, Tensor], learn_clips: bool) -> None:
        super().__init__()
        self.sites = nn.ModuleList(sites)
        self.clip_logits = nn.ParameterDict(
            {role: nn.Parameter(logits.clone(), requires_grad=learn_clips) for role, logits in clip_logits.items()}
        )

    def transforms(
        self, opened: float, stability_factor: float, dtype: torch.dtype = torch.float32
    ) -> dict[str, SiteTransform]:
        """The masked transforms by site name."""
        return {p.site.name: p.transform(opened, stability_factor, dtype) for p in self.sites}

    def clips(self) -> dict[str, Tensor]:
        """Clipping factors [O, G] by role; a logit of infinity is exactly 1."""
        return {role: logits.sigmoid() for role, logits in self.clip_logits.items()}

    def groups(self, learning_rate: float, clipping_rate: float) -> list[dict]:
        """Parameter groups for the optimiser."""
        clips = [p for p in self.clip_logits.values() if p.requires_grad]
        return [
            {"params": [p for p in self.sites.parameters() if p.requires_grad], "lr": learning_rate},
            {"params": clips, "lr": clipping_rate},
        ]


def _inverse(matrix: Tensor) -> Tensor:
    """Batched inverse [heads, d, d], in float64 where the condition number asks for it."""
    if matrix.dtype is torch.float32:
        norm = torch.linalg.matrix_norm(matrix.detach(), float("inf"))
        inverse = torch.linalg.inv(matrix)
        bound = norm * torch.linalg.matrix_norm(inverse.detach(), float("inf"))
        return inverse if bool((bound < WELL_CONDITIONED).all()) else torch.linalg.inv(matrix.double()).float()
    return torch.linalg.inv(matrix)


def _rotations(scale: Tensor, angle: Tensor) -> Tensor:
    """[heads, d, d] from [heads, d/2]: the scaled rotation of every pair (j, j + d/2)."""
    cos, sin = torch.diag_embed(scale * angle.cos()), torch.diag_embed(scale * angle.sin())
    return torch.cat((torch.cat((cos, -sin), -1), torch.cat((sin, cos), -1)), -2)
