"""What one optimisation step costs against the plain forward and backward of the float block, as a ratio in one run.

    python examples/benchmarks/step_cost.py --model SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.valid.raw

Both sides take the same 2,048 tokens of real text through the same block and compute both losses of the augmented loss
(to two cached targets); the plain side is one forward and backward of the float block with gradients for its weights.
The sides alternate; the median of their ratios is quoted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from afq_export.arch.decoder import block, embed, family
from afq_export.arch.ops import FloatOps
from afq_export.calibrate.calibrate import run_block
from afq_export.calibrate.learn import BlockProblem, train_step
from afq_export.calibrate.ops import token_power, token_weights
from afq_export.calibrate.start import start_parameters
from afq_export.calibrate.statistics import input_statistics
from afq_export.fold.forms import choose_forms
from afq_export.load.corpus import cut_windows, read_text_corpus
from afq_export.load.model import open_model
from afq_export.load.tokenizer import open_tokenizer
from afq_export.quantize.assign import assign
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.quant import linear_name

TOKENS, WINDOWS = 512, 4


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model = open_model(arguments.model)
    recipe = load_recipe(arguments.recipe, tuple(arguments.set))
    records = assign(model.config, recipe, load_target("android-xnnpack"))
    corpus = read_text_corpus(Path(arguments.text))
    windows = cut_windows(corpus, open_tokenizer(model), "", TOKENS, WINDOWS)
    config, index = model.config, arguments.block
    x = embed(config, model.embedding(), windows.ids_NT)
    for before in range(index):
        x = run_block(config, FloatOps(config, model.block(before)), x, WINDOWS)
    weights = model.block(index)
    roles = family(config).linear_shapes(config)
    of_block = {role: records[linear_name(index, role)] for role in roles}
    y = run_block(config, FloatOps(config, weights), x, WINDOWS)
    power = token_power(y)
    importance = token_weights(power, power.mean(), recipe.learning.loss)
    problem = BlockProblem(config, weights, of_block, x, (y, y), importance)
    statistics_ = input_statistics(config, weights, x, WINDOWS)
    parameters = start_parameters(choose_forms(config, recipe.transforms), recipe, weights, statistics_, of_block)
    plain_weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    part = torch.arange(WINDOWS)

    def step() -> None:
        train_step(problem, parameters, 1.0, recipe.learning.stability_factor, part, recipe.learning)

    def plain() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.learning.autocast == "bfloat16"):
            z = block(config, FloatOps(config, plain_weights), x)
        (F.mse_loss(z.float(), y) + F.mse_loss(z.float(), y)).backward()

    step(), plain()
    pairs = [(seconds(step), seconds(plain)) for _ in range(arguments.runs)]
    ratios = [ours / theirs for ours, theirs in pairs]
    print(
        f"{TOKENS * WINDOWS} tokens, block {index}, {recipe.name}, matmuls {recipe.learning.autocast}, "
        f"{arguments.threads} thread(s), {arguments.runs} pairs"
    )
    print(f"step   {statistics.median(ours for ours, _ in pairs):.3f} s (median)")
    print(f"plain  {statistics.median(theirs for _, theirs in pairs):.3f} s (median), one forward and backward")
    print(f"ratio  {statistics.median(ratios):.2f} (median; {min(ratios):.2f} to {max(ratios):.2f})")


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipe", default="w4a8-g32")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
