"""What learning a block costs: against the paper's schedule, against the matmuls alone, and how it grows.

    python examples/benchmarks/cost.py schedule --model stories260K --text tinystories_val.txt --blocks 0,2,4
    python examples/benchmarks/cost.py profile --model SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.valid.raw
    python examples/benchmarks/cost.py growth --model stories260K --text tinystories_val.txt

`schedule` learns the same blocks on the same windows twice: by the recipe, and by the paper's schedule (SmoothQuant's
diagonals and unclipped ranges as start, 20 epochs of single windows, constant learning rates 5e-3 and 1e-2, float32).
Both have this program's transforms, loss and step; start values and all measurements count. Losses are measured in
float32 on all windows that were learned on, and on windows that neither has seen. `profile` says where one step's time
goes and how far it is from its matmuls, `growth` times whole calibrations. Seconds are those that the processor worked
for this process (one thread), so that other work on the machine disturbs them least.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from afq_export.arch.decoder import block, embed, family
from afq_export.arch.ops import FloatOps
from afq_export.calibrate.calibrate import calibrate, run_block
from afq_export.calibrate.learn import (
    BlockProblem,
    block_output_loss,
    learn_block,
    quantized_block_weights,
    train_step,
)
from afq_export.calibrate.ops import block_loss, matmuls_in, quantized_weights, token_power, token_weights
from afq_export.calibrate.parameters import UNCLIPPED, BlockParameters
from afq_export.calibrate.start import start_parameters
from afq_export.calibrate.statistics import input_statistics
from afq_export.fold.forms import choose_forms
from afq_export.fold.sites import fold_block
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.corpus import Windows, cut_windows, read_text_corpus
from afq_export.load.model import open_model
from afq_export.load.tokenizer import open_tokenizer
from afq_export.machine import settle
from afq_export.progress import silent
from afq_export.quantize.assign import assign
from afq_export.report.tables import Table
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.quant import linear_name
from afq_export.spec.recipe import Recipe

BATCH = 4
PAPER = (
    "transforms.start=smoothquant",
    "learning.schedule=constant",
    "learning.learning_rate=0.005",
    "learning.clipping_rate=0.01",
    "learning.epochs=20",
    "learning.batch=1",
    "learning.autocast=float32",
    "learning.held_out=0",
    "learning.patience=0",
)
"""AffineQuant's published scripts (arXiv 2403.12544)."""


def main() -> None:
    arguments = parse()
    settle(arguments.threads)
    model = open_model(arguments.model)
    corpus = read_text_corpus(Path(arguments.text))
    count = arguments.windows + (arguments.unseen if arguments.what == "schedule" else 0)
    windows = cut_windows(corpus, open_tokenizer(model), "", arguments.length, count)
    recipe = load_recipe(arguments.recipe, tuple(arguments.set))
    {"schedule": schedule, "profile": profile_step, "growth": growth}[arguments.what](arguments, model, recipe, windows)


def schedule(arguments: argparse.Namespace, model: FloatCheckpoint, recipe: Recipe, windows: Windows) -> None:
    """One line a block: losses and seconds of both schedules."""
    paper = load_recipe(arguments.recipe, (*arguments.set, *PAPER))
    rows = []
    for index, seen, unseen in problems(model, recipe, windows.ids_NT, arguments.blocks, arguments.unseen):
        ours, theirs = learned(seen, unseen, recipe), learned(seen, unseen, paper, unclipped=True)
        losses = (f"{loss:.3e}" for pair in zip(theirs.losses, ours.losses, strict=True) for loss in pair)
        seconds = f"{theirs.seconds:.1f}", f"{ours.seconds:.1f}", f"{ours.seconds / theirs.seconds:.3f}"
        rows.append((str(index), f"{theirs.start:.3e}", f"{ours.start:.3e}", *losses, *seconds))
        print("block", *rows[-1], *ours.events, *theirs.events, flush=True)
    pairs = (f"{what}: {whose}" for what in ("start", "learned", "unseen", "s") for whose in ("paper", "ours"))
    header = ("block", *pairs, "part")
    print(Table(header, tuple(rows), frozenset(range(1, len(header)))).markdown())


@dataclasses.dataclass(frozen=True)
class Result:
    """Loss of the start values on the windows learned on, losses of the result on those and on unseen ones."""

    start: float
    losses: tuple[float, float]
    seconds: float
    events: tuple[str, ...]


def learned(seen: BlockProblem, unseen: BlockProblem, recipe: Recipe, *, unclipped: bool = False) -> Result:
    """Start values, learning and its own measurements, timed; then losses."""
    learning = recipe.learning
    seen = dataclasses.replace(seen, held_out=learning.held_out)
    before = time.process_time()
    start = start_values(seen, recipe)
    if unclipped:
        for logits in start.clip_logits.values():
            logits.data.fill_(UNCLIPPED)
    found = learn_block(seen, start, learning, 0, lambda epoch, epochs: None)
    seconds = time.process_time() - before
    after = found.parameters, found.opened, found.stability_factor
    losses = loss_on_all(seen, *after), loss_on_all(unseen, *after)
    return Result(loss_on_all(seen, start, 0.0, 0.0), losses, seconds, found.events)


def start_values(problem: BlockProblem, recipe: Recipe) -> BlockParameters:
    """As the calibrate stage finds them."""
    seen = input_statistics(problem.config, problem.weights, problem.inputs, BATCH)
    choices = choose_forms(problem.config, recipe.transforms)
    return start_parameters(choices, recipe, problem.weights, seen, problem.records)


@torch.no_grad()
def loss_on_all(problem: BlockProblem, parameters: BlockParameters, opened: float, alpha: float) -> float:
    """Mean loss over all windows of a problem, float32."""
    weights = quantized_block_weights(problem, parameters, opened, alpha)
    parts = torch.arange(len(problem.inputs)).split(BATCH)
    return sum(float(block_output_loss(problem, weights, part)) * len(part) for part in parts) / len(problem.inputs)


def problems(
    model: FloatCheckpoint, recipe: Recipe, ids_NT: Tensor, blocks: tuple[int, ...], unseen: int
) -> Iterator[tuple[int, BlockProblem, BlockProblem]]:
    """The chosen blocks with the windows that are learned on, and with every so-manieth, `unseen` in all, that is not.

    The blocks before have been quantized at their start values.
    """
    config, count = model.config, len(ids_NT)
    records = assign(config, recipe, load_target("android-xnnpack"))
    hidden = torch.zeros(count, dtype=torch.bool)
    hidden[torch.arange(unseen) * count // max(1, unseen)] = True
    x_float = x_quant = embed(config, model.embedding(), ids_NT)
    for index in range(max(blocks) + 1):
        weights = model.block(index)
        of_block = {role: records[linear_name(index, role)] for role in family(config).linear_shapes(config)}
        y = run_block(config, FloatOps(config, weights), x_float, BATCH)
        targets = (y, run_block(config, FloatOps(config, weights), x_quant, BATCH)) if index else (y,)
        power = token_power(y)
        importance = token_weights(power, power.mean(), recipe.learning.loss)
        whole = BlockProblem(config, weights, of_block, x_quant, targets, importance)
        seen = some_windows(whole, ~hidden)
        if index in blocks:
            yield index, seen, some_windows(whole, hidden)
        if index < max(blocks):
            with torch.no_grad():
                quantized = quantized_block_weights(seen, start_values(seen, recipe), 0.0, 0.0)
            x_quant = run_block(config, seen.ops(quantized), x_quant, BATCH)
        x_float = y


def some_windows(problem: BlockProblem, windows: Tensor) -> BlockProblem:
    """The same problem on fewer windows."""
    targets = tuple(target[windows] for target in problem.targets)
    importance = problem.token_weights[windows]
    return dataclasses.replace(problem, inputs=problem.inputs[windows], targets=targets, token_weights=importance)


def profile_step(arguments: argparse.Namespace, model: FloatCheckpoint, recipe: Recipe, windows: Windows) -> None:
    """Where the time of one step goes, and the step against its matmuls and against the float block."""
    ((_, problem, _),) = problems(model, recipe, windows.ids_NT, (max(arguments.blocks),), 0)
    parameters, part = start_values(problem, recipe), torch.arange(len(problem.inputs))
    groups = [g for g in parameters.groups(1e-3, 1e-3) if g["params"]]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    alpha, bf16 = recipe.learning.stability_factor, recipe.learning.autocast == "bfloat16"

    def step() -> None:
        train_step(problem, parameters, 1.0, alpha, part, recipe.learning)
        optimiser.step()

    def in_parts() -> None:
        """The same step with its backward pass cut where the weights are, so that parts can be told apart."""
        parameters.zero_grad(set_to_none=True)
        with record_function("part: transforms and folding"):
            transforms = parameters.transforms(1.0, alpha)
            folded = fold_block(family(problem.config).fold_sites(problem.config), transforms, problem.weights)
        with record_function("part: weights on their grid"):
            quantized = quantized_weights(folded, parameters.clips(), problem.records)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in quantized.items()}
        with record_function("part: block"):
            with matmuls_in(recipe.learning.autocast, problem.token_weights.device):
                loss = block_output_loss(problem, leaves, part)
            loss.backward()
        with record_function("part: weights and folding, backward"):
            moved = [name for name, tensor in quantized.items() if tensor.requires_grad]
            torch.autograd.backward([quantized[name] for name in moved], [leaves[name].grad for name in moved])
        with record_function("part: optimiser"):
            optimiser.step()

    seconds, floor = median(step, arguments.runs), median(matmuls(problem, bf16), arguments.runs)
    plain = median(float_step(problem, recipe.learning.autocast), arguments.runs)
    found = parts(in_parts, arguments.runs)
    total = sum(found.values())
    rows = tuple((name, f"{1e3 * s:.1f}", f"{s / total:.0%}") for name, s in found.most_common())
    print(Table(("part of a step", "ms", "share"), rows, frozenset((1, 2))).markdown())
    tokens = problem.inputs.shape[0] * problem.inputs.shape[1]
    print(f"\n{tokens} tokens, {recipe.name}, {recipe.learning.autocast}: step {1e3 * seconds:.0f} ms,", end=" ")
    print(f"its matmuls alone {1e3 * floor:.0f} ms, ratio {seconds / floor:.2f};", end=" ")
    print(f"the float block {1e3 * plain:.0f} ms, ratio {seconds / plain:.2f} (medians of {arguments.runs})")


def parts(step: Callable[[], None], runs: int) -> collections.Counter[str]:
    """Seconds of one step by part, the least over the runs of every part: matmuls and attention by operation, the rest
    by where it was called."""
    step()
    least: collections.Counter[str] = collections.Counter()
    for run in range(runs):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        found: collections.Counter[str] = collections.Counter()
        for event in profiler.events():
            found[part_of(event)] += event.self_cpu_time_total / 1e6
        least = found if run == 0 else collections.Counter({name: min(s, found[name]) for name, s in least.items()})
    return least


def part_of(event) -> str:
    """What an operation belongs to."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    outer = next((name.removeprefix("part: ") for name in names if name.startswith("part: ")), "other")
    if outer != "block":
        return outer
    if names[0] == "aten::bmm" or any("attention" in name or "softmax" in name for name in names):
        return "attention"
    if names[0] in ("aten::mm", "aten::addmm"):
        return "matmuls of the linears"
    if "_StraightThrough" in names:
        return "inputs on their grids"
    return "precision casts" if "aten::_to_copy" in names else "norms, gate, sums, loss, forth and back"


def matmuls(problem: BlockProblem, bf16: bool) -> Callable[[], None]:
    """Only the matmuls of a step: of each linear one forward and two backward, of attention two and four, and of those
    the half that a causal mask leaves."""
    config, dtype = problem.config, torch.bfloat16 if bf16 else torch.float32
    windows, tokens, _ = problem.inputs.shape
    linears = []
    for outputs, inputs, _ in family(config).linear_shapes(config).values():
        sizes = (windows * tokens, inputs), (outputs, inputs), (windows * tokens, outputs)
        linears.append([torch.ones(size, dtype=dtype) for size in sizes])
    half = tokens // 2
    q = torch.ones(windows * config.heads, tokens, config.head_dim, dtype=dtype)
    scores = torch.ones(windows * config.heads, tokens, half, dtype=dtype)

    def run() -> None:
        for x, weight, gradient in linears:
            x @ weight.T, gradient @ weight, gradient.T @ x
        for _ in range(3):
            q @ q[:, :half].mT, scores @ q[:, :half]

    return run


def float_step(problem: BlockProblem, autocast: str) -> Callable[[], None]:
    """Forward and backward of the float block with gradients for its weights, and the same losses: what a step would
    take without transforms and grids."""
    weights = {name: tensor.clone().requires_grad_() for name, tensor in problem.weights.items()}

    def run() -> None:
        with matmuls_in(autocast, problem.token_weights.device):
            y = block(problem.config, FloatOps(problem.config, weights), problem.inputs)
        block_loss(y, problem.targets, problem.token_weights).backward()

    return run


def growth(arguments: argparse.Namespace, model: FloatCheckpoint, recipe: Recipe, windows: Windows) -> None:
    """Seconds of whole calibrations, with blocks, tokens and epochs changed one at a time, against a straight line."""
    layers, epochs, count = model.config.layers, recipe.learning.epochs, len(windows.ids_NT)
    rows = []
    for what, sizes in (
        ("blocks", [n for n in (1, 2, 4, 8, 16, 32) if n < layers] + [layers]),
        ("tokens", [count // 4, count // 2, count]),
        ("epochs", [epochs, 2 * epochs, 4 * epochs]),
    ):
        seconds = []
        for size in sizes:
            fewer = model if what != "blocks" else shortened(model, size)
            ids = windows.ids_NT[:size] if what == "tokens" else windows.ids_NT
            changes = (*arguments.set, f"learning.epochs={size}") if what == "epochs" else tuple(arguments.set)
            longer = load_recipe(arguments.recipe, changes)
            seconds.append(calibration_seconds(fewer, longer, dataclasses.replace(windows, ids_NT=ids)))
        line = statistics.linear_regression(sizes, seconds)
        for size, found in zip(sizes, seconds, strict=True):
            expected = line.slope * size + line.intercept
            shown = size * windows.length if what == "tokens" else size
            rows.append((what, str(shown), f"{found:.2f}", f"{expected:.2f}", f"{found / expected - 1:+.0%}"))
            print(*rows[-1], flush=True)
    print(Table(("of", "number", "s", "straight line", "off it"), tuple(rows), frozenset((1, 2, 3, 4))).markdown())


def shortened(model: FloatCheckpoint, layers: int) -> FloatCheckpoint:
    """The model with its first blocks only."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, layers=layers))


def calibration_seconds(model: FloatCheckpoint, recipe: Recipe, windows: Windows) -> float:
    """Of a whole calibration into a folder that is thrown away."""
    records = assign(model.config, recipe, load_target("android-xnnpack"))
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        calibrate(model, recipe, records, windows, Path(folder), 0, silent)
        return time.process_time() - before


def median(function: Callable[[], None], runs: int) -> float:
    """Seconds that the processor worked in `function`, median over runs after a first one."""
    found = []
    for _ in range(runs + 1):
        before = time.process_time()
        function()
        found.append(time.process_time() - before)
    return statistics.median(found[1:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("schedule", "profile", "growth"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipe", default="w4a8-g32")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--blocks", type=lambda text: tuple(int(part) for part in text.split(",")), default=(1,))
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--unseen", type=int, default=8)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
