"""After the blocks: the logits of the whole quantized model brought near the float model's.

Block by block nobody sees what an error does to the logits in the end. What is still free, and costs nothing at run
time, is the scale of every weight group, the norms' gains and, where the recipe has a rate for them, the codes. They
are learned on the Kullback-Leibler divergence from the float model's next-token distributions, so no text is learned by
heart (EfficientQAT's second phase, arXiv 2407.11062, section 3.3, E2E-QP, with a teacher where that has labels).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from afq_export.arch.decoder import embed, head
from afq_export.arch.ops import FloatOps, Weights
from afq_export.calibrate.activations import IN_MEMORY, ActivationStore
from afq_export.calibrate.calibrate import run_block
from afq_export.calibrate.fused import divergence
from afq_export.calibrate.ops import matmuls_in, moved
from afq_export.calibrate.result import Calibration, Tuned
from afq_export.calibrate.student import Student, student_of, tuned_result
from afq_export.errors import InputError
from afq_export.load.checkpoint import DecoderWeights
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.spec.history import Tuning
from afq_export.spec.recipe import Autocast, EndToEnd, Recipe
from afq_export.spec.target import TargetProfile

HELD_OUT = 8
"""One window in as many is not learned from: it says whether what was learned is kept."""
MOST_HELD = 8
"""Windows that are held out at most."""
WARM_UP = 5
"""Steps in which the learning rates rise; then they fall to 0 along a cosine."""


def refuse_end_to_end(recipe: Recipe, target: TargetProfile) -> None:
    """Raises InputError where the target has every tensor on a grid: found before, for the scales that there were."""
    if recipe.end_to_end.steps and target.static_graph:
        why = f"every tensor of {target.name} lies on a grid that was found before"
        raise InputError("nothing end to end", where=recipe.name, why=why, do="set end_to_end.steps = 0")


def tune(
    model: DecoderWeights,
    recipe: Recipe,
    records: Mapping[str, LinearRecord],
    calibration: Calibration,
    ids_NT: Tensor,
    seen_NT: Tensor,
    seed: int,
    progress: Progress,
    store: ActivationStore = IN_MEMORY,
) -> Tuned:
    """Learns `recipe.end_to_end` on the windows `ids_NT`. `seen_NT`: those that the blocks were calibrated on.

    Some windows are held out; when their divergence has not become less, everything stays as it was. The first loss
    that is not finite ends the learning.
    """
    plan = recipe.end_to_end
    results = tuple(calibration.block(index) for index in range(calibration.layers))
    student = student_of(model, recipe, records, calibration, store.device)
    teacher = _Teacher(model, plan, ids_NT, store)
    held, rest = hold_out(ids_NT, seen_NT)
    before = _divergence(student, teacher, held)
    optimiser = torch.optim.Adam(student.learned(plan), betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _course(step, plan.steps))
    generator, losses = torch.Generator().manual_seed(seed), []
    for step, part in enumerate(_draw(rest, plan, generator)):
        progress("calibrate: end to end, step", step, plan.steps)
        optimiser.zero_grad(set_to_none=True)
        loss = _step(student, teacher, part, plan)
        if not math.isfinite(loss):
            break
        losses.append(loss)
        optimiser.step()
        scheduler.step()
    progress("calibrate: end to end, step", plan.steps, plan.steps)
    after = _divergence(student, teacher, held)
    told = after if math.isfinite(after) else None
    history = Tuning(plan.steps, len(ids_NT), before, told, after < before, tuple(losses))
    if not history.kept:
        return Tuned(results, {}, history)
    blocks = tuple(tuned_result(part, result) for part, result in zip(student.blocks, results, strict=True))
    return Tuned(blocks, {name: t.detach().cpu() for name, t in student.norm.items()}, history)


def hold_out(ids_NT: Tensor, seen_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the windows that are held out, and of the others: evenly spaced over those that calibration of the
    blocks has not seen, where there are such; on what GPTQ has seen it is better than it is."""
    seen = {tuple(ids) for ids in seen_NT.tolist()}
    fresh = [index for index, ids in enumerate(ids_NT.tolist()) if tuple(ids) not in seen] or list(range(len(ids_NT)))
    count = min(MOST_HELD, math.ceil(len(fresh) / HELD_OUT))
    held = [fresh[i * len(fresh) // count] for i in range(count)]
    rest = [index for index in range(len(ids_NT)) if index not in held]
    return torch.tensor(held), torch.tensor(rest or held)


class _Teacher:
    """The float model's last hidden states of all windows [N, T, D], and its head."""

    def __init__(self, model: DecoderWeights, plan: EndToEnd, ids_NT: Tensor, store: ActivationStore) -> None:
        self.ids, self.ops = ids_NT.to(store.device), FloatOps(model.config, moved(model.head(), store.device))
        shape = torch.Size((*ids_NT.shape, model.config.hidden))
        rows = moved(model.embedding(), store.device)
        self.hidden = store.collect((embed(model.config, rows, ids) for ids in self.ids.split(plan.batch)), shape)
        for index in range(model.config.layers):
            ops = FloatOps(model.config, moved(model.block(index), store.device))
            self.hidden = run_block(model.config, ops, self.hidden, plan.batch, store, plan.autocast)

    def logits(self, window: Tensor) -> Tensor:
        """[1, T, V] of one window."""
        return head(self.ops, self.hidden[window])


def _step(student: Student, teacher: _Teacher, part: Tensor, plan: EndToEnd) -> float:
    """Gradients on the windows `part`; returns the loss. Weights are made once, and windows go through one by one."""
    weights = student.weights()
    leaves = [{name: _leaf(name, tensor, plan) for name, tensor in of_block.items()} for of_block in weights]
    total = 0.0
    for window in part.split(1):
        loss = _window_divergence(student, teacher, leaves, window, plan.autocast) / len(part)
        loss.backward()
        total += float(loss.detach())
    made = [(weights[i][name], leaf.grad) for i, found in enumerate(leaves) for name, leaf in found.items()]
    made = [(tensor, grad) for tensor, grad in made if tensor.requires_grad and grad is not None]
    torch.autograd.backward([tensor for tensor, _ in made], [grad.to(tensor.dtype) for tensor, grad in made])
    return total


def _leaf(name: str, tensor: Tensor, plan: EndToEnd) -> Tensor:
    """What gradients are gathered at over the windows of a step: matrices in the precision of the matmuls."""
    half = plan.autocast == "bfloat16" and tensor.dim() == 2
    return tensor.detach().to(torch.bfloat16 if half else tensor.dtype).requires_grad_(tensor.requires_grad)


def _window_divergence(
    student: Student, teacher: _Teacher, weights: Sequence[Weights], window: Tensor, autocast: Autocast
) -> Tensor:
    """Mean over tokens of KL(float || quantized), in nats, matmuls in `autocast`."""
    with matmuls_in(autocast, teacher.ids.device):
        with torch.no_grad():
            wanted = teacher.logits(window)
        found = student.logits(weights, teacher.ids[window])
    return divergence(wanted, found)


@torch.no_grad()
def _divergence(student: Student, teacher: _Teacher, windows: Tensor) -> float:
    """The same over several windows, in float32: what bfloat16 rounds away can be all that was learned."""
    weights = student.weights()
    found = [float(_window_divergence(student, teacher, weights, window, "float32")) for window in windows.split(1)]
    return sum(found) / len(found)


def _draw(windows: Tensor, plan: EndToEnd, generator: torch.Generator) -> Iterable[Tensor]:
    """The windows of every step; all are seen once before any is seen again."""
    count = plan.steps * plan.batch
    rounds = math.ceil(count / len(windows))
    order = torch.cat([windows[torch.randperm(len(windows), generator=generator)] for _ in range(rounds)])
    return order[:count].split(plan.batch)


def _course(step: int, steps: int) -> float:
    """Factor on the learning rates."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
