"""Which form of transform a recipe gets at a site, or why it gets none."""

from __future__ import annotations

import dataclasses

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.errors import InputError
from afq_export.spec.online import NORM_MATRIX
from afq_export.spec.recipe import Transforms
from afq_export.spec.sites import FoldSite, Form


@dataclasses.dataclass(frozen=True)
class SiteChoice:
    """What a recipe does at a site. `form` None: nothing, and `reason` says why. `shift_reason`: why no shift."""

    site: FoldSite
    asked: str
    form: Form | None
    shift: bool = False
    reason: str = ""
    shift_reason: str = ""


def choose_forms(config: DecoderConfig, transforms: Transforms) -> tuple[SiteChoice, ...]:
    """One choice per site of a block. Raises InputError for an `affine` transform that would neither fold exactly nor
    may stay in the program, and when none is asked for that was to stay there."""
    if NORM_MATRIX in transforms.online and transforms.norm_to_linears != "affine":
        raise InputError(
            "no matrix behind the norms",
            where=f"transforms.online = {NORM_MATRIX!r}",
            why=f"transforms.norm_to_linears = {transforms.norm_to_linears!r} learns none",
            do="set transforms.norm_to_linears = 'affine', or leave it out",
        )
    return tuple(_choose(site, transforms) for site in family(config).fold_sites(config))


def _choose(site: FoldSite, transforms: Transforms) -> SiteChoice:
    asked: str = getattr(transforms, site.kind.value)
    if asked == "off":
        return SiteChoice(site, asked, None, reason="the recipe leaves it alone")
    forms = site.forms + (site.online if NORM_MATRIX in transforms.online else ())
    form = next((form for form in _ASKED[asked] if form in forms), None)
    if form is None:
        reason = site.refused.get(asked) or site.refused.get("affine") or "does not fold exactly here"
        if asked == "affine" and site.forms:
            raise InputError(
                "transform refused",
                where=f"transforms.{site.kind.value} = {asked!r} at {site.name}",
                why=reason,
                do=f"use {' or '.join(repr(form.value) for form in site.forms)}"
                + (f", or let it stay: transforms.online = [{NORM_MATRIX!r}]" if site.online else ""),
            )
        return SiteChoice(site, asked, None, reason=reason)
    shift = transforms.shift and site.shift and form is not Form.PERMUTATION
    return SiteChoice(
        site, asked, form, shift, shift_reason="" if shift or not transforms.shift else _no_shift(site, form)
    )


_ASKED = {
    "diagonal": (Form.DIAGONAL,),
    "affine": (Form.PER_HEAD, Form.ROPE_PAIRS),
    "permutation": (Form.PERMUTATION,),
}


def _no_shift(site: FoldSite, form: Form) -> str:
    return site.refused.get("shift", "no place for a shift here")
