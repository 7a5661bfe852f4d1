"""Folding one transform into the weights around its site: exact identities, differentiable, in any float dtype.

Calibration learns through these functions in float32 and the fold stage runs the same ones in float64, so what is
learned is what is folded. With A the matrix, s the shift (row vectors, AffineQuant eq. 2-4):

    norm_to_linears  gain' = gain / a      bias' = (bias - s) / a        W' = W diag(a)      b' = b + W s
         online, any A: behind the norm  (norm - s) A^-1                 W' = W A^T          b' = b + W s
    v_to_o           Wv'_k = A_k^-T Wv_k   bv'_k = (bv_k - s_k) A_k^-1   Wo'_h = Wo_h A_k^T  bo' = bo + sum Wo_h s_k
    q_to_k           Wq'_h = A_k^T Wq_h    bq'_h = bq_h A_k              Wk'_k = A_k^-1 Wk_k bk'_k = bk_k A_k^-T
    up_to_down       Wup' = Wup / a        bup' = bup / a                Wdown' = Wdown diag(a)

h runs over query heads, k = h // repeats is its KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from afq_export.fold.transform import SiteTransform
from afq_export.spec.online import MATRIX_KIND
from afq_export.spec.sites import FoldSite, Form, SiteKind

Weights = Mapping[str, Tensor]


def fold_site(site: FoldSite, transform: SiteTransform, weights: Weights) -> dict[str, Tensor]:
    """`weights` of a block with `transform` folded into them; tensors that it does not touch are shared."""
    rule: dict[SiteKind, Callable[[FoldSite, SiteTransform, Weights], dict[str, Tensor]]] = {
        SiteKind.NORM_TO_LINEARS: _norm_to_linears,
        SiteKind.V_TO_O: _v_to_o,
        SiteKind.Q_TO_K: _q_to_k,
        SiteKind.UP_TO_DOWN: _up_to_down,
    }
    return {**weights, **rule[site.kind](site, transform, weights)}


def fold_block(
    sites: tuple[FoldSite, ...], transforms: Mapping[str, SiteTransform], weights: Weights
) -> dict[str, Tensor]:
    """`weights` with every transform of a block folded, in the order of the family's site table."""
    folded = dict(weights)
    for site in sites:
        if site.name in transforms:
            folded = fold_site(site, transforms[site.name], folded)
    return folded


def _norm_to_linears(site: FoldSite, transform: SiteTransform, w: Weights) -> dict[str, Tensor]:
    (norm,) = site.producers
    a, shift, bias = transform.matrix, transform.shift, w.get(f"{norm}.bias")
    new = {}
    if bias is not None:
        new[f"{norm}.bias"] = bias if shift is None else bias - shift
    if transform.form is Form.DIAGONAL:
        new = {name: tensor / a for name, tensor in ({f"{norm}.weight": w[f"{norm}.weight"]} | new).items()}
    else:
        (new[f"{norm}.{MATRIX_KIND}"],) = transform.inverted()
    for role in site.consumers:
        new[f"{role}.weight"] = _columns(site, transform, w[f"{role}.weight"])
        if shift is not None:
            new[f"{role}.bias"] = w[f"{role}.bias"] + w[f"{role}.weight"] @ shift
    return new


def _v_to_o(site: FoldSite, transform: SiteTransform, w: Weights) -> dict[str, Tensor]:
    (producer,), (consumer,) = site.producers, site.consumers
    shift = transform.shift
    v, o = w[f"{producer}.weight"], w[f"{consumer}.weight"]
    new = {
        f"{producer}.weight": _rows(site, transform, v, inverse=True),
        f"{consumer}.weight": _columns(site, transform, o),
    }
    bias = w.get(f"{producer}.bias")
    if bias is not None:
        shifted = bias if shift is None else bias - shift
        new[f"{producer}.bias"] = _rows(site, transform, shifted[:, None], inverse=True)[:, 0]
    if shift is not None:
        per_query_head = shift.view(site.heads, 1, -1).expand(-1, site.repeats, -1).reshape(-1)
        new[f"{consumer}.bias"] = w[f"{consumer}.bias"] + o @ per_query_head
    return new


def _q_to_k(site: FoldSite, transform: SiteTransform, w: Weights) -> dict[str, Tensor]:
    (query,), (key,) = site.producers, site.consumers
    matrix, inverse, heads, d = _matrices(site, transform), _inverses(site, transform), site.heads, site.head_dim
    new = {}
    for kind in ("weight", "bias"):
        if f"{query}.{kind}" in w:
            q = w[f"{query}.{kind}"]
            rows = q.reshape(heads, site.repeats, d, -1)
            new[f"{query}.{kind}"] = torch.einsum("kij,krin->krjn", matrix, rows).reshape(q.shape)
        if f"{key}.{kind}" in w:
            k = w[f"{key}.{kind}"]
            new[f"{key}.{kind}"] = (inverse @ k.reshape(heads, d, -1)).reshape(k.shape)
    return new


def _up_to_down(site: FoldSite, transform: SiteTransform, w: Weights) -> dict[str, Tensor]:
    (consumer,) = site.consumers
    down = w[f"{consumer}.weight"]
    if transform.form is Form.PERMUTATION:
        order = transform.matrix
        new = {f"{consumer}.weight": down[:, order]}
        for role in site.producers:
            new |= {key: w[key][order] for key in (f"{role}.weight", f"{role}.bias") if key in w}
        return new
    up, a = site.producers[0], transform.matrix
    new = {f"{up}.weight": w[f"{up}.weight"] / a[:, None], f"{consumer}.weight": down * a}
    if f"{up}.bias" in w:
        new[f"{up}.bias"] = w[f"{up}.bias"] / a
    return new


def _rows(site: FoldSite, transform: SiteTransform, w: Tensor, *, inverse: bool) -> Tensor:
    """A_k^-T applied to the rows of each KV head; `w` [heads * d, n]."""
    if transform.form is Form.DIAGONAL:
        return w / transform.matrix[:, None]
    if transform.form is Form.PERMUTATION:
        return w[transform.matrix]
    return (_inverses(site, transform).mT @ w.view(site.heads, site.head_dim, -1)).reshape(w.shape)


def _columns(site: FoldSite, transform: SiteTransform, w: Tensor) -> Tensor:
    """W A_k^T on the columns of every query head of KV head k; `w` [O, heads * repeats * d]."""
    heads, repeats, d = site.heads, site.repeats, site.head_dim
    if transform.form is Form.DIAGONAL:
        return w * transform.matrix.view(heads, 1, d).expand(-1, repeats, -1).reshape(-1)
    if transform.form is Form.PERMUTATION:
        local = transform.matrix.view(heads, 1, d) - torch.arange(heads, device=w.device)[:, None, None] * d
        start = torch.arange(heads * repeats, device=w.device).view(heads, repeats, 1) * d
        return w[:, (local + start).reshape(-1)]
    columns = w.view(-1, heads, repeats, d)
    return torch.einsum("okri,kji->okrj", columns, transform.matrix).reshape(w.shape)


def _matrices(site: FoldSite, transform: SiteTransform) -> Tensor:
    """A as [heads, d, d]."""
    if transform.form is Form.DIAGONAL:
        return torch.diag_embed(transform.matrix.view(site.heads, site.head_dim))
    return transform.matrix


def _inverses(site: FoldSite, transform: SiteTransform) -> Tensor:
    """A^-1 as [heads, d, d]."""
    if transform.form is Form.DIAGONAL:
        return torch.diag_embed((1 / transform.matrix).view(site.heads, site.head_dim))
    return transform.inverted()
