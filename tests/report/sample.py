"""A report with something in every field."""

from __future__ import annotations

from afq_export.spec import report as spec


def sample(**changes: object) -> spec.ValidationReport:
    """A passing report of two linears, fields replaced by `changes`."""
    figure = spec.Perplexity(value=3.70, stderr=0.05, tokens=4080)
    near = spec.Agreement(top1=0.985, kl=2.5e-3, tokens=4080)
    layer = spec.LayerReport(
        name="blocks.0.q_proj",
        kernel="qd8-f32-qb4w",
        passed=True,
        exact=True,
        max_steps=0.0,
        max_relative_error=0.0,
        sqnr_db=31.25,
        note="group | 32 does not divide 172",
    )
    fields: dict = {
        "verdict": "pass",
        "model": spec.Model(name="stories260K", digest="a" * 64, type="llama"),
        "recipe": "w4a8-g32",
        "target": "android-xnnpack",
        "protocol": spec.Protocol(
            corpus="tinystories",
            digest="b" * 64,
            tokenizer_digest="c" * 64,
            window=256,
            stride=256,
            bos=False,
            windows=16,
            windows_in_corpus=700,
        ),
        "perplexity": spec.Perplexities(
            float_=figure,
            folded=figure,
            fake_quant=figure,
            integer=figure,
            runtime=spec.Perplexity(value=3.80, stderr=0.05, tokens=4080),
        ),
        "agreement": spec.AgreementReport(
            top1=0.9995,
            kl=1e-6,
            float_operators="executorch",
            bit_for_bit=0.75,
            against_float={"folded": near, "fake_quant": near, "integer": near, "runtime": near},
            disagreements=(
                spec.Disagreement(0, 17, 5, 9, 3e-2, "flipped_step", "blocks.0.down_proj"),
                spec.Disagreement(1, 3, 8, 2, 1e-5, "near_tie"),
            ),
        ),
        "fold": spec.FoldReport(1e-14, 1e-6),
        "layers": (layer, spec.LayerReport("lm_head", "qd8-f32-qc8w", True, False, 0.2, 1e-7, None)),
        "first_departure": None,
        "coverage": spec.Coverage(
            lowered=(spec.Lowered("blocks.0.q_proj", "qd8-f32-qb4w"), spec.Lowered("lm_head", "qd8-f32-qc8w")),
            refused=(spec.Refused("llama::custom_sdpa", 5, "attention over the cache"),),
        ),
        "cost": spec.Cost(calibrate_s=42.0, export_s=None, peak_rss_mb=812.0),
        "artifact": spec.Artifact(bytes=579584, sha256="d" * 64),
        "checks": (
            spec.Check("rung float", "passed", "perplexity 3.7"),
            spec.Check("fold", "skipped", "the source model was not given"),
        ),
    }
    return spec.ValidationReport(**fields | changes)
