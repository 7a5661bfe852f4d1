"""The check of what ONNX Runtime holds in a quantized cache: it passes on our files and sees a single wrong byte."""

from __future__ import annotations

import pytest

from afq_export.lower.onnx.float_parts import OnnxFloatParts
from afq_export.lower.onnx.program import opset_of
from afq_export.spec.recipe import KvCache
from afq_export.validate.cache import cache_check, verdict_on
from afq_export.validate.onnxruntime import runtime_checks
from afq_export.validate.rungs import integer_rung
from tests.checkpoints import random_checkpoint, small_config
from tests.lower.onnx.decoders import decoder_config, lowered, random_ids

pytest.importorskip("onnxruntime", reason="the runtime is not installed")
TOKENS = 8


@pytest.mark.parametrize("changes", [("kv_cache.bits=8",), ("kv_cache.bits=4", "kv_cache.group=8")])
def test_the_runtime_holds_the_references_bytes(tmp_path, changes: tuple[str, ...]) -> None:
    file = lowered(tmp_path, decoder_config(kv_heads=1), "w8a8-dynamic", changes=changes)
    checks = runtime_checks(
        file.path, file.options, file.target, file.checkpoint, random_ids(file.config.vocab, TOKENS)
    )
    found = {check.name: check for check in checks}["kv cache"]
    assert found.status == "passed"
    row, floats = (16 + 8, 64) if changes == ("kv_cache.bits=8",) else (8 + 16, 64)
    size = 2 * file.config.layers * TOKENS * row
    assert found.detail == (
        f"{size:,} bytes held for 8 tokens, {row / floats:.1%} of a float cache's; "
        f"{size:,} of {size:,} bytes are the reference's"
    )


def test_one_wrong_byte_is_seen(tmp_path) -> None:
    file = lowered(tmp_path, decoder_config(layers=1), "w8a8-dynamic", changes=("kv_cache.bits=8",))
    parts = OnnxFloatParts(opset_of(file.checkpoint, file.target), file.target, file.options, kept=False)
    rung, ids = integer_rung(file.checkpoint, file.target, parts=parts), random_ids(file.config.vocab, TOKENS)
    outputs = file.session().run_both(ids)[1]
    assert cache_check(outputs, rung, ids).status == "passed"
    outputs["present.0.value"][0, 1, 3, 5] ^= 1
    wrong = cache_check(outputs, rung, ids)
    assert wrong.status == "failed"
    assert "767 of 768 bytes" in wrong.detail


def test_more_bytes_than_promised_fail(tmp_path) -> None:
    checkpoint = random_checkpoint(tmp_path / "quantized", small_config(layers=1), kv_cache=KvCache(8))
    promised = TOKENS * 2 * 2 * (32 + 8)
    assert verdict_on(checkpoint, promised, TOKENS, "", True).status == "passed"
    assert verdict_on(checkpoint, promised + 1, TOKENS, "", True).status == "failed"
