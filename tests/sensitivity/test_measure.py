"""What is measured against what happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.arch.decoder import block, embed, head
from afq_export.arch.ops import FloatOps
from afq_export.calibrate.start import quantize_rows
from afq_export.job import Prepared
from afq_export.progress import silent
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.sensitivity import measure as module
from afq_export.sensitivity.damage import rounding_error
from afq_export.sensitivity.measure import measure
from afq_export.sensitivity.options import ROWS, find_options

Make = Callable[..., Prepared]


def test_what_is_measured_orders_grids(make: Make) -> None:
    """Finer grids cost less, in sum; float rows nothing; the same seed gives the same figures, another others."""
    job = make("opt")
    options = find_options(job)
    damages = measure(job, options, silent)
    by_grid: dict[str, float] = {}
    for name, records in options.linears.items():
        for record, damage in zip(records, damages[name], strict=True):
            by_grid[str(record.spec.weight)] = by_grid.get(str(record.spec.weight), 0.0) + damage
    assert 0 < by_grid["int8 per_channel"] < by_grid["int4 g32"] / 10
    assert damages[ROWS][[rows.bits for rows in options.rows].index(32)] == 0
    assert measure(job, options, silent) == damages
    assert measure(make("opt", seed=1), options, silent) != damages


def test_it_predicts_what_happens(make: Make) -> None:
    """The divergence that one linear alone causes on the same windows: its rank and its size, for 4 and for 8 bits,
    where most of it is the input's."""
    job = make(changes=("samples.windows=8", "samples.length=48"))
    options = find_options(job)
    damages = measure(job, options, silent)
    base = log_probabilities(job, None)
    pairs: dict[int, list[tuple[float, float]]] = {}
    for name, records in options.linears.items():
        for record, damage in zip(records, damages[name], strict=True):
            kl = float((base.exp() * (base - log_probabilities(job, record))).sum(-1).mean())
            pairs.setdefault(record.spec.weight.bits, []).append((damage, kl))
            if name == "lm_head":
                assert damage == pytest.approx(kl, rel=0.2)
    for found in pairs.values():
        ranks = torch.tensor(found).argsort(0).argsort(0).double()
        assert float(torch.corrcoef(ranks.T)[0, 1]) > 0.9
        assert float(torch.tensor([damage / kl for damage, kl in found]).median()) == pytest.approx(1, rel=0.2)


def test_some_tokens_stand_for_all_in_the_head(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make(changes=("samples.windows=8", "samples.length=48"))
    options = find_options(job)
    whole = measure(job, options, silent)
    monkeypatch.setattr(module, "HEAD_TOKENS", 16)
    sampled = measure(job, options, silent)
    assert sampled["lm_head"] != whole["lm_head"] and sampled["lm_head"] == pytest.approx(whole["lm_head"], rel=0.2)
    assert sampled[ROWS] == whole[ROWS]


class _ChangedOps(FloatOps):
    """One linear as it will be, everything else float."""

    record: LinearRecord | None = None

    def linear(self, role: str, x: Tensor) -> Tensor:
        if self.record is None or self.record.spec.role != role:
            return super().linear(role, x)
        weight = self.weights[f"{role}.weight"]
        changed = weight + rounding_error(weight, self.record.spec.weight)
        return F.linear(quantize_rows(x, self.record.spec.activation), changed, self.weights.get(f"{role}.bias"))


def log_probabilities(job: Prepared, record: LinearRecord | None) -> Tensor:
    config, ids_NT = job.model.config, job.calibration.ids_NT

    def ops(weights: dict[str, Tensor], index: int | None) -> _ChangedOps:
        made = _ChangedOps(config, weights)
        made.record = record if record is not None and record.spec.block == index else None
        return made

    x = embed(config, job.model.embedding(), ids_NT)
    for index in range(config.layers):
        x = block(config, ops(job.model.block(index), index), x)
    return head(ops(job.model.head(), None), x).double().log_softmax(-1)
