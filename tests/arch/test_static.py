"""The block with named tensors is the block: every tensor passes once, under the name that the module lists."""

from __future__ import annotations

import pytest
import torch

from afq_export.arch import static
from afq_export.arch.decoder import block, family
from afq_export.arch.ops import FloatOps
from afq_export.arch.static import StaticOps
from tests.models import llama_config, opt_config, random_tensors


def weights(config, seed: int = 0) -> dict[str, torch.Tensor]:
    tensors = random_tensors(config, seed)
    return {ours: tensors[theirs] for ours, theirs in family(config).block_names(config, 0).items()}


CONFIGS = {
    "grouped": llama_config(),
    "one KV head": llama_config(kv_heads=1),
    "no groups": llama_config(kv_heads=4),
    "q and k norms": llama_config(qk_norm=True),
    "biases": llama_config(qkv_bias=True),
    "relu": llama_config(activation="relu"),
    "opt": opt_config(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_change_nothing(name: str) -> None:
    config, x = CONFIGS[name], torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    floats = {key: tensor.double() for key, tensor in weights(config).items()}
    expected = block(config, FloatOps(config, floats), x)
    found = block(config, StaticOps(config, FloatOps(config, floats), lambda name, x: x), x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_shown_once_and_documented(name: str) -> None:
    config, seen = CONFIGS[name], []
    ops = StaticOps(config, FloatOps(config, weights(config)), lambda name, x: seen.append(name) or x)
    block(config, ops, torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)))
    block_tensors = [name for name in seen if name not in ("cos", "sin")]
    assert len(block_tensors) == len(set(block_tensors)), "no name is taken twice"
    if config.family == "llama":
        documented = set((static.__doc__ or "").replace("[", " ").replace("]", " ").replace("`", " ").split())
        assert set(seen) <= documented


def test_queries_and_keys_take_turns_block_after_block() -> None:
    config, seen = llama_config(), []
    ops = StaticOps(config, FloatOps(config, weights(config)), lambda name, x: seen.append(name) or x)
    for _batch in range(2):
        block(config, ops, torch.zeros(1, 3, 32))
    turned = [name for name in seen if name.endswith("_rotated")]
    assert turned == ["q_rotated", "k_rotated"] * 2


def test_what_a_visit_returns_is_used() -> None:
    config = llama_config()
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))

    def without_mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x) if name in ("down_proj", "o_proj") else x

    found = block(config, StaticOps(config, FloatOps(config, weights(config)), without_mlp), x)
    assert torch.equal(found, x)
