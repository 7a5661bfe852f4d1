"""Streaming changes no number; statistics are what their names say."""

from __future__ import annotations

import math

import pytest
import torch

from afq_export.validate import evaluate
from afq_export.validate.evaluate import TokenStats, measure, measure_one
from afq_export.validate.rungs import FloatRung, integer_rung
from tests.checkpoints import DequantizedWeights, random_checkpoint, random_windows, small_config, xnnpack_target


class FixedSession:
    """A runtime session that answers with given logits [N, T, V], found by the window's ids."""

    vocab, context, prefill = 96, 64, 8

    def __init__(self, ids_NT, logits_NTV):
        self.answers = {tuple(ids.tolist()): logits for ids, logits in zip(ids_NT, logits_NTV, strict=True)}

    def logits(self, ids):
        return self.answers[tuple(ids.tolist())]


@pytest.fixture
def session():
    ids = random_windows_ids()
    logits = torch.randn(*ids.shape, 96, generator=torch.Generator().manual_seed(5)) * 3
    return ids, logits, FixedSession(ids, logits)


def random_windows_ids():
    return torch.randint(96, (3, 16), generator=torch.Generator().manual_seed(1))


def test_statistics_by_their_definitions(session):
    ids, logits, rung = session
    other = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(6))
    result = measure({"a": rung, "b": FixedSession(ids, other)}, ids, [("a", "b")])
    p, q = logits.double().softmax(-1), other.double().softmax(-1)
    stats, pair = result.rungs["a"], result.pairs["a", "b"]
    for n in range(3):
        for t in range(15):
            assert stats.nll[n, t] == pytest.approx(-math.log(p[n, t, ids[n, t + 1]]), rel=1e-12)
            assert stats.top1[n, t] == logits[n, t].argmax()
            kl = float((p[n, t] * (p[n, t].log() - q[n, t].log())).sum())
            assert pair.kl[n, t] == pytest.approx(kl, rel=1e-9)
            ours, theirs = int(logits[n, t].argmax()), int(other[n, t].argmax())
            assert bool(pair.same[n, t]) == (ours == theirs)
            gap = float((logits[n, t, ours] - logits[n, t, theirs]) / logits[n, t].abs().max())
            assert pair.margin[n, t] == pytest.approx(gap)
    assert not pair.same.all()


def test_perplexity_and_its_error():
    nll = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    figure = TokenStats(nll, torch.zeros(5, 7, dtype=torch.int64)).perplexity
    assert figure.value == pytest.approx(math.exp(nll.mean()))
    assert figure.stderr == pytest.approx(figure.value * nll.mean(1).std() / math.sqrt(5))
    assert figure.tokens == 35
    single = TokenStats(nll[:1], torch.zeros(1, 7, dtype=torch.int64)).perplexity
    assert single.stderr == pytest.approx(single.value * nll[0].std() / math.sqrt(7))


def test_the_uniform_model_has_the_vocabulary_as_perplexity():
    ids = random_windows_ids()
    assert measure_one(FixedSession(ids, torch.zeros(3, 16, 96)), ids).perplexity.value == pytest.approx(96)


def test_chunks_and_batches_change_nothing(tmp_path, monkeypatch):
    """Whole against window by window, and against the plain decoder; the integer rung bit for bit in its choices."""
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config())
    ids = random_windows(checkpoint.config, count=5).ids_NT
    rungs = {"float": FloatRung(DequantizedWeights(checkpoint)), "integer": integer_rung(checkpoint, xnnpack_target())}
    whole = measure(rungs, ids, [("float", "integer")])
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 16)
    monkeypatch.setattr(evaluate, "SOFTMAX_TOKENS", 4)
    parts = measure(rungs, ids, [("float", "integer")])
    assert torch.allclose(whole.rungs["float"].nll, parts.rungs["float"].nll, rtol=1e-5)
    assert torch.equal(whole.rungs["float"].top1, parts.rungs["float"].top1)
    assert torch.allclose(whole.pairs["float", "integer"].kl, parts.pairs["float", "integer"].kl, rtol=1e-2, atol=1e-6)
    assert whole.rungs["integer"].nll.shape == (5, 15)


def test_one_block_at_a_time(tmp_path):
    """No block is read twice per chunk, and none before the one before it is done."""
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config())
    reads = []

    class Counted(DequantizedWeights):
        def block(self, index, dtype=torch.float32):
            reads.append(index)
            return super().block(index, dtype)

    measure_one(FloatRung(Counted(checkpoint)), random_windows(checkpoint.config, count=9).ids_NT)
    assert reads == [0, 1]


def test_progress_ends_where_it_should(session):
    ids, _, rung = session
    seen = []
    measure({"a": rung}, ids, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("logits", 3, 3)
