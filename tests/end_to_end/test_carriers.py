"""The trained demo Llama as other architectures: the same function, so the same logits, integers and file's figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.model import open_model
from afq_export.quantize.checkpoint import QuantizedCheckpoint, open_checkpoint
from afq_export.spec.catalog import data_root, demo_model
from afq_export.validate.evaluate import hidden_states
from afq_export.validate.rungs import FloatRung
from tests.end_to_end.runs import Runs

RECIPE = "w8a8-dynamic+rtn"
KINDS = ("mha", "qwen2", "mistral")
SLOW = {"mistral": pytest.mark.slow}


def script() -> ModuleType:
    """examples/carriers.py; examples are no package."""
    spec = importlib.util.spec_from_file_location("carriers", data_root() / "examples" / "carriers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def carriers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, write = tmp_path_factory.mktemp("carriers"), script().write_carrier
    return {kind: write(kind, demo_model(), folder / kind) for kind in KINDS}


@torch.no_grad()
def logits(model: FloatCheckpoint) -> Tensor:
    """Float32 [2, 64, V] on token ids that the vocabulary has."""
    rung = FloatRung(model)
    ids = torch.arange(128).view(2, 64) * 7 % model.config.vocab
    return rung.head().linear("lm_head", rung.head().norm("final_norm", hidden_states(rung, ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_is_the_same_to_the_bit(carriers: dict[str, Path], kind: str) -> None:
    original, carrier = open_model(str(demo_model())), open_model(str(carriers[kind]))
    assert carrier.config.model_type == ("llama" if kind == "mha" else kind)
    assert carrier.config.kv_heads == (original.config.heads if kind == "mha" else original.config.kv_heads)
    assert carrier.config.qkv_bias == (kind == "qwen2")
    assert torch.equal(logits(carrier), logits(original))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in KINDS])
def test_the_file_is_the_same(runs: Runs, carriers: dict[str, Path], kind: str) -> None:
    original, carrier = runs("demo-llama", RECIPE), runs(str(carriers[kind]), RECIPE)
    assert carrier.report.verdict == "pass"
    assert carrier.report.agreement.bit_for_bit == 1
    assert carrier.report.perplexity == original.report.perplexity
    one, two = (open_checkpoint(outcome.folder.quantized) for outcome in (original, carrier))
    assert list(one.records) == list(two.records)
    assert all(same_integers(one, two, name) for name in one.records)


def same_integers(one: QuantizedCheckpoint, two: QuantizedCheckpoint, name: str) -> bool:
    """Whether a linear of the carrier is the original's, its KV heads repeated where there are more of them."""
    ours, theirs = one.linear(name), two.linear(name)
    repeats = theirs.spec.outputs // ours.spec.outputs
    by_head = ours.codes.unflatten(0, (one.config.kv_heads if repeats > 1 else 1, -1))
    no_bias = theirs.bias is None or not theirs.bias.any()
    return no_bias and torch.equal(by_head.repeat_interleave(repeats, 0).flatten(0, 1), theirs.codes)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("qwen2", {"head_dim": 16}, "heads of hidden / heads = 32, not 16"),
        ("qwen2", {"mlp_bias": True}, "no place for this model's biases"),
        ("mistral", {"attention_bias": True}, "no place for this model's biases"),
    ],
)
def test_what_the_other_architecture_lacks_is_refused(kind: str, changes: dict[str, object], said: str) -> None:
    config = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32} | changes
    with pytest.raises(ValueError, match=said):
        script().CARRIERS[kind](config, {})
