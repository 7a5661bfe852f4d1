"""The gradual mask (AffineQuant, arXiv 2403.12544, eq. 6-7)."""

from __future__ import annotations

import torch
from torch import Tensor


def gradual_mask(size: int, opened: float, stability_factor: float, device: torch.device | None = None) -> Tensor:
    """GM [size, size]: 1 on the diagonal, `stability_factor` where 0 < |i - j| <= opened * size, else 0.

    `opened` is epoch / epochs: the band widens until it covers the matrix. Built by index arithmetic.
    """
    index = torch.arange(size, device=device)
    distance = (index[:, None] - index[None, :]).abs()
    mask = (distance <= opened * size).float() * stability_factor
    mask.fill_diagonal_(1.0)
    return mask
