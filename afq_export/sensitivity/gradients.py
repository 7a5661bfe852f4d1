"""Inputs and output gradients of every linear, in one pass forward and one pass backward over calibration windows.

Weights are read block by block in both directions: what enters each block is kept, and the block is computed again on
the way back. Memory is one block, CHUNK_BYTES of hidden states, and the logits of one window.

The gradients are those of the summed cross-entropy of tokens drawn from the model's own predictions: the mean of their
outer product is the Fisher information, that is the second derivative of KL(model || changed model). With the tokens of
the text it would be that only for a model that has nothing left to learn (arXiv 1905.12558).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import block, embed, head
from afq_export.arch.ops import FloatOps, Weights
from afq_export.load.checkpoint import DecoderWeights
from afq_export.progress import Progress, silent

CHUNK_BYTES = 1 << 30
"""Hidden states held at a time; for the windows that do not fit, weights are read again."""


class Observer(Protocol):
    """What is done with the gradients; each call returns what is then called once a window (T tokens).

    Gradients are of the window's summed loss.
    """

    def block(self, index: int, weights: Weights) -> Callable[[str, Tensor, Tensor, Tensor], None]:
        """For a linear's role, input [T, I], and the gradients [T, I] through it alone and [T, O] at its output."""

    def head(self, weights: Weights) -> Callable[[Tensor, Tensor], None]:
        """For lm_head's input [T, D] and the probabilities [T, V] that it gives."""

    def rows(self, rows_VD: Tensor) -> Callable[[Tensor, Tensor], None]:
        """For ids [T] and the gradient at their token rows [T, D]."""


class TapedOps(FloatOps):
    """FloatOps that keeps input and output of every linear as nodes of the graph; a shared input is a node for each."""

    def __init__(self, config: DecoderConfig, weights: Weights) -> None:
        super().__init__(config, weights)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def linear(self, role: str, x: Tensor) -> Tensor:
        own = x.view_as(x)
        y = super().linear(role, own)
        self.seen[role] = (own, y)
        return y


def observe_gradients(
    model: DecoderWeights, ids_NT: Tensor, seed: int, observer: Observer, progress: Progress = silent
) -> None:
    """Runs the windows `ids_NT` through `model` and back, and shows `observer` what every linear got and caused."""
    generator, layers = torch.Generator().manual_seed(seed), model.config.layers
    chunks = ids_NT.split(max(1, CHUNK_BYTES // (4 * model.config.hidden * (layers + 1) * ids_NT.shape[1])))
    for number, chunk in enumerate(chunks):

        def tick(step: int, before: int = 2 * layers * number) -> None:
            progress("sensitivity", before + step, 2 * layers * len(chunks))

        states = _forward(model, chunk, tick)
        gradients = _through_head(model, states.pop(), generator, observer)
        for index in reversed(range(layers)):
            tick(2 * layers - 1 - index)
            gradients = _through_block(model, index, states.pop(), gradients, observer)
        tick(2 * layers)
        show = observer.rows(model.embedding()["embed_tokens.weight"])
        for ids_T, gradient_TD in zip(chunk, gradients, strict=True):
            show(ids_T, gradient_TD)


@torch.no_grad()
def _forward(model: DecoderWeights, ids_NT: Tensor, tick: Callable[[int], None]) -> list[Tensor]:
    """What enters every block, and the final norm last: [N, T, D] each."""
    states = [embed(model.config, model.embedding(), ids_NT)]
    for index in range(model.config.layers):
        tick(index)
        ops = FloatOps(model.config, model.block(index))
        states.append(torch.cat([block(model.config, ops, x) for x in states[-1].split(1)]))
    return states


def _through_head(model: DecoderWeights, x_NTD: Tensor, generator: torch.Generator, observer: Observer) -> Tensor:
    """The gradient [N, T, D] at what enters the final norm; tokens are drawn here."""
    weights = model.head()
    show, gradients = observer.head(weights), torch.empty_like(x_NTD)
    for number, state in enumerate(x_NTD.split(1)):
        x, ops = state.requires_grad_(), TapedOps(model.config, weights)
        logits_TV = head(ops, x)[0]
        probabilities = logits_TV.detach().softmax(-1)
        show(ops.seen["lm_head"][0][0].detach(), probabilities)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        error = probabilities.scatter_add(1, drawn, torch.full(drawn.shape, -1.0))
        gradients[number] = torch.autograd.grad(logits_TV, x, error)[0][0]
    return gradients


def _through_block(model: DecoderWeights, index: int, x_NTD: Tensor, out_NTD: Tensor, observer: Observer) -> Tensor:
    """The gradient [N, T, D] at what enters block `index`, from the one at what leaves it."""
    weights = model.block(index)
    show, gradients = observer.block(index, weights), torch.empty_like(x_NTD)
    for number, (state, gradient) in enumerate(zip(x_NTD.split(1), out_NTD.split(1), strict=True)):
        x, ops = state.requires_grad_(), TapedOps(model.config, weights)
        y = block(model.config, ops, x)
        nodes = [node for pair in ops.seen.values() for node in pair]
        gradients[number], *found = (g[0] for g in torch.autograd.grad(y, [x, *nodes], gradient))
        for place, (role, (seen, _)) in enumerate(ops.seen.items()):
            show(role, seen[0].detach(), found[2 * place], found[2 * place + 1])
    return gradients
