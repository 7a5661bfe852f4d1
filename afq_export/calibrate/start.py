"""Start values: diagonals from statistics or a search, permutations, shifts, clipping factors.

With `learning.epochs = 0` they are the result: SmoothQuant (arXiv 2211.10438, eq. 4), AWQ (arXiv 2306.00978,
section 3.2) and RPTQ (arXiv 2304.01089) are recipes that stop here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.calibrate.parameters import UNCLIPPED, BlockParameters, SiteParameters
from afq_export.calibrate.statistics import InputStatistics
from afq_export.fold.forms import SiteChoice
from afq_export.quantize.activations import INT8, fake_quantize_dynamic
from afq_export.quantize.checkpoint import LinearRecord, dequantize
from afq_export.quantize.grid import grouped, weight_codes, weight_scales
from afq_export.spec.quant import QuantSpec
from afq_export.spec.recipe import Recipe
from afq_export.spec.sites import FoldSite, Form, SiteKind

POWERS = tuple(i / 10 for i in range(11))
CLIPS = tuple(1 - i / 40 for i in range(21))
"""Clipping factors that the search tries: 1.0 down to 0.5."""

Statistics = Mapping[str, InputStatistics]
Weights = Mapping[str, Tensor]
Records = Mapping[str, LinearRecord]
"""Role -> record, of one block."""


def start_parameters(
    choices: Sequence[SiteChoice], recipe: Recipe, weights: Weights, statistics: Statistics, records: Records
) -> BlockParameters:
    """Parameters of a block at their start values."""
    sites = []
    for choice in choices:
        if choice.form is None:
            continue
        start = _start(choice, recipe, weights, statistics, records)
        sites.append(SiteParameters(choice, start, _shift(choice, statistics)))
    folded_columns = {role: start for p in sites for role, start in _column_scales(p).items()}
    logits = {
        role: _clip_logits(recipe, weights[f"{role}.weight"], folded_columns.get(role), statistics[role], record)
        for role, record in records.items()
    }
    return BlockParameters(sites, logits, learn_clips=recipe.learning.clipping == "learn")


def _start(choice: SiteChoice, recipe: Recipe, weights: Weights, statistics: Statistics, records: Records) -> Tensor:
    """The first diagonal [dim] of a site, or the order of a permutation."""
    site, transforms = choice.site, recipe.transforms
    if choice.form is Form.PERMUTATION:
        return _order(site, statistics)
    if transforms.start == "ones" or site.kind is SiteKind.Q_TO_K:
        return torch.ones(site.dim, device=weights[f"{site.consumers[0]}.weight"].device)
    largest, mean, weight = _site_statistics(site, weights, statistics)
    smooth = [_normalised(largest**p / weight ** (1 - p)) for p in (POWERS if transforms.start == "search" else ())]
    if transforms.start == "smoothquant":
        return _normalised(largest**transforms.power / weight ** (1 - transforms.power))
    candidates = [_normalised(mean**p) for p in POWERS] + smooth
    errors = [_consumer_error(site, diagonal, weights, statistics, records) for diagonal in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def _site_statistics(site: FoldSite, weights: Weights, statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """(largest |x|, mean |x|, largest |w|) per channel of the site [dim], at the consumers' input."""
    seen = statistics[site.consumers[0]]
    weight = torch.stack([weights[f"{role}.weight"].abs().amax(0) for role in site.consumers]).amax(0)
    values = [_per_kv_head(site, v, torch.amax) for v in (seen.largest, seen.mean, weight)]
    largest, mean, weight = (v.clamp_min(1e-5 * float(v.max()) + 1e-30) for v in values)
    return largest, mean, weight


def _per_kv_head(site: FoldSite, columns: Tensor, reduce) -> Tensor:
    """[heads * repeats * d] -> [heads * d]: query heads of a KV head share its channels."""
    if site.repeats == 1:
        return columns
    return reduce(columns.view(site.heads, site.repeats, -1), 1).reshape(-1)


def _normalised(diagonal: Tensor) -> Tensor:
    """The same ratios around 1: a common factor changes nothing after folding."""
    return (diagonal.log() - diagonal.log().mean()).exp().clamp(1e-3, 1e3)


def expand_columns(site: FoldSite, diagonal: Tensor) -> Tensor:
    """[heads * d] -> [heads * repeats * d], the site's diagonal on its consumers' columns."""
    return diagonal.view(site.heads, 1, -1).expand(-1, site.repeats, -1).reshape(-1)


def _consumer_error(
    site: FoldSite, diagonal: Tensor, weights: Weights, statistics: Statistics, records: Records
) -> float:
    """Squared output error of the consumers when the diagonal is folded and everything is quantized."""
    columns = expand_columns(site, diagonal)
    error = 0.0
    for role in site.consumers:
        weight, rows, record = weights[f"{role}.weight"], statistics[role].rows, records[role]
        spec = record.spec.weight
        scaled = weight * columns
        scales = weight_scales(scaled, scaled.new_ones(1), spec)
        quantized = dequantize(weight_codes(scaled, scales, spec), scales, spec.group)
        inputs = quantize_rows(rows / columns, record.spec.activation)
        error += float((F.linear(inputs, quantized) - F.linear(rows, weight)).square().sum())
    return error


def quantize_rows(x: Tensor, spec: QuantSpec | None) -> Tensor:
    """Rows on the grid that the kernel would give them; static grids are judged by one grid for all rows."""
    if spec is None:
        return x
    if spec.dynamic:
        return fake_quantize_dynamic(x, spec)
    return fake_quantize_dynamic(x.reshape(1, -1), INT8).view_as(x)


def _order(site: FoldSite, statistics: Statistics) -> Tensor:
    """Channels sorted by their largest |x|, within every head: neighbours in a group get alike (RPTQ)."""
    largest = _per_kv_head(site, statistics[site.consumers[0]].largest, torch.amax).view(site.heads, -1)
    order = largest.argsort(dim=-1, stable=True)
    return (order + torch.arange(site.heads, device=order.device)[:, None] * site.head_dim).reshape(-1)


def _shift(choice: SiteChoice, statistics: Statistics) -> Tensor | None:
    """The middle of each channel's range (Outlier Suppression+, arXiv 2304.09145), where a shift folds."""
    if not choice.shift:
        return None
    seen = statistics[choice.site.consumers[0]]
    low, high = _per_kv_head(choice.site, seen.low, torch.amin), _per_kv_head(choice.site, seen.high, torch.amax)
    return (low + high) / 2


def _column_scales(parameters: SiteParameters) -> dict[str, Tensor]:
    """What a start diagonal multiplies the columns of its consumers by."""
    site = parameters.site
    if parameters.form not in (Form.DIAGONAL, Form.PER_HEAD) or site.kind is SiteKind.Q_TO_K:
        return {}
    columns = expand_columns(site, parameters.log_diagonal.detach().exp())
    return dict.fromkeys(site.consumers, columns)


def _clip_logits(
    recipe: Recipe, weight: Tensor, columns: Tensor | None, seen: InputStatistics, record: LinearRecord
) -> Tensor:
    """Logits [O, G] of the clipping factors: infinity is no clipping at all."""
    spec = record.spec.weight
    shape = (weight.shape[0], spec.groups(weight.shape[1]))
    if recipe.learning.clipping == "off":
        return weight.new_full(shape, torch.inf)
    columns = weight.new_ones(weight.shape[1]) if columns is None else columns
    clips = search_clips(weight * columns, seen.energy / columns.square(), spec)
    unclipped = UNCLIPPED if recipe.learning.clipping == "learn" else torch.inf
    return torch.where(clips < 1, clips.clamp(0.3, 0.999).logit(), unclipped)


def search_clips(weight_OI: Tensor, energy_I: Tensor, spec: QuantSpec) -> Tensor:
    """The factor among CLIPS, per group [O, G], with the least rounding error weighted by the inputs' energy."""
    values, energy = grouped(weight_OI, spec), grouped(energy_I[None, :], spec)
    best = values.new_ones(values.shape[:2])
    least = values.new_full(values.shape[:2], torch.inf)
    for clip in CLIPS:
        scales = weight_scales(weight_OI, weight_OI.new_tensor(clip), spec)[..., None]
        rounded = (values / scales).round_().clamp_(spec.qmin, spec.qmax).mul_(scales)
        error = (rounded.sub_(values).square_() * energy).sum(-1)
        better = error < least
        best, least = torch.where(better, clip, best), torch.where(better, error, least)
    return best
