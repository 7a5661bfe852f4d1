"""The pass through blocks one at a time against autograd through the whole model at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import block, embed, family, head
from afq_export.arch.ops import FloatOps
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.sensitivity import gradients
from afq_export.sensitivity.gradients import observe_gradients
from afq_export.spec.quant import linear_name
from tests.models import llama_config, opt_config, random_tensors

SEED = 5
IDS = torch.randint(0, 260, (3, 12), generator=torch.Generator().manual_seed(0))


class Source:
    """Tensors by checkpoint key."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.read = tensors.__getitem__


class Seen:
    """The weight gradient of every linear, window by window, and those of inputs and rows."""

    def __init__(self) -> None:
        self.weights: dict[str, list[Tensor]] = {}
        self.inputs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.probabilities: list[Tensor] = []
        self.embeddings: list[Tensor] = []
        self.blocks: list[int] = []

    def block(self, index: int, weights: Any) -> Callable[..., None]:
        self.blocks.append(index)

        def show(role: str, x_TI: Tensor, through_TI: Tensor, gradient_TO: Tensor) -> None:
            self.weights.setdefault(linear_name(index, role), []).append(gradient_TO.T @ x_TI)
            assert torch.allclose(through_TI, gradient_TO @ weights[f"{role}.weight"], rtol=1e-4, atol=1e-6)
            assert not x_TI.requires_grad

        return show

    def head(self, weights: Any) -> Callable[..., None]:
        return lambda x_TD, p_TV: self.probabilities.append(p_TV)

    def rows(self, rows_VD: Tensor) -> Callable[..., None]:
        return lambda ids_T, gradient_TD: self.embeddings.append(gradient_TD)


def checkpoint(config: DecoderConfig) -> FloatCheckpoint:
    return FloatCheckpoint(config, Source(random_tensors(config)), "random", "")


@pytest.mark.parametrize("config", [llama_config(), opt_config()], ids=["llama", "opt"])
def test_gradients_are_those_of_the_whole_model(config: DecoderConfig) -> None:
    model, seen = checkpoint(config), Seen()
    observe_gradients(model, IDS, SEED, seen)
    blocks = [
        {key: value.requires_grad_(key.endswith("proj.weight") or key.startswith("fc")) for key, value in b.items()}
        for b in (model.block(index) for index in range(config.layers))
    ]
    generator = torch.Generator().manual_seed(SEED)
    for number, ids in enumerate(IDS.split(1)):
        start = embed(config, model.embedding(), ids).requires_grad_()
        x = start
        for weights in blocks:
            x = block(config, FloatOps(config, weights), x)
        logits = head(FloatOps(config, model.head()), x)[0]
        assert torch.allclose(logits.softmax(-1), seen.probabilities[number], atol=1e-6)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        names = [(i, role) for i in range(config.layers) for role in family(config).linear_shapes(config)]
        wanted = [blocks[i][f"{role}.weight"] for i, role in names]
        found = torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), [start, *wanted])
        assert torch.allclose(found[0][0], seen.embeddings[number], rtol=1e-3, atol=1e-5)
        for (index, role), gradient in zip(names, found[1:], strict=True):
            assert torch.allclose(gradient, seen.weights[linear_name(index, role)][number], rtol=1e-3, atol=1e-4)
    assert seen.blocks == list(reversed(range(config.layers)))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Seen(), Seen()
    observe_gradients(checkpoint(llama_config()), IDS, SEED, whole)
    monkeypatch.setattr(gradients, "CHUNK_BYTES", 1)
    steps = []
    observe_gradients(checkpoint(llama_config()), IDS, SEED, parts, lambda *step: steps.append(step))
    for name, found in whole.weights.items():
        assert torch.equal(torch.stack(found), torch.stack(parts.weights[name]))
    assert parts.blocks == [1, 0] * len(IDS)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps) and steps[-1][1] == steps[-1][2] == 12
