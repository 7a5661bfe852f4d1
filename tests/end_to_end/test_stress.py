"""Weights and shapes at their worst: the file is its integer reference to the bit, or the run says why not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from afq_export.errors import InputError
from afq_export.load.config import read_config
from afq_export.spec.report import ValidationReport
from afq_export.spec.request import Request
from tests.end_to_end.runs import run
from tests.models import edit_config, random_tensors, write_model

KERNELS = (("android-xnnpack", "w8a8-dynamic+smoothquant"), ("linux-x64-ort", "w8a8-static+rtn"))
BLOCK = "model.layers.0."
Q, DOWN, UP = BLOCK + "self_attn.q_proj.weight", BLOCK + "mlp.down_proj.weight", BLOCK + "mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def outliers(weights: Tensors) -> None:
    weights[Q][3, 5], weights[DOWN][0, 0] = 1e4, -1e4


def a_row_of_zeros(weights: Tensors) -> None:
    weights[Q][2] = 0
    weights[DOWN][7] = 0


def a_constant_channel(weights: Tensors) -> None:
    weights[UP][:, 4] = 0.25
    weights["model.embed_tokens.weight"][:, 1] = 1.0


def all_alike(weights: Tensors) -> None:
    weights[Q][:] = 0.5


def denormals(weights: Tensors) -> None:
    weights[DOWN][:] = 1e-40 * weights[DOWN].sign()


def a_dead_norm(weights: Tensors) -> None:
    weights[BLOCK + "input_layernorm.weight"][::2] = 0


def one_token_stands_out(weights: Tensors) -> None:
    weights["model.embed_tokens.weight"][40] *= 300


def infinite(weights: Tensors) -> None:
    weights[Q][0, 0] = float("inf")


def not_a_number(weights: Tensors) -> None:
    weights[DOWN][1, 1] = float("nan")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A calibration and an evaluation text of letters."""
    folder, written = tmp_path_factory.mktemp("texts"), {}
    for name, seed in (("calib", 1), ("eval", 2)):
        chosen = random.Random(seed)
        path = folder / f"{name}.txt"
        path.write_text("\n".join("".join(chosen.choices("abcdefgh ", k=60)) for _ in range(40)), encoding="utf-8")
        written[name] = str(path)
    return written


def changed(folder: Path, change: Callable[[Tensors], None]) -> Path:
    """A random Llama with a tokenizer, its weights changed."""
    path = write_model(folder) / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)
    return folder


def shaped(folder: Path, **sizes: int) -> Path:
    """A random Llama of other sizes."""
    edit_config(write_model(folder), **sizes)
    config, _ = read_config(folder)
    save_file(random_tensors(config), folder / "model.safetensors")
    return folder


def asked(model: Path, texts: dict[str, str], target: str, recipe: str, **changes: object) -> Request:
    given = {"changes": ("samples.windows=2", "samples.length=32"), "window": 32, "eval_windows": 1, "threads": 1}
    return Request(model=str(model), target=target, recipe=recipe, **(texts | given | changes))


HARD = (outliers, a_row_of_zeros, a_constant_channel, all_alike, denormals, a_dead_norm, one_token_stands_out)


@pytest.mark.parametrize("change", HARD, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("target", "recipe"), KERNELS)
def test_weights(tmp_path: Path, texts, change, target: str, recipe: str) -> None:
    is_its_reference(run(asked(changed(tmp_path / "m", change), texts, target, recipe), tmp_path / "run").report)


SLOW = pytest.mark.slow
SHAPES = {
    "heads of 80": dict(hidden_size=160, head_dim=80, num_attention_heads=2, num_key_value_heads=1),
    "heads of 96": dict(hidden_size=96, head_dim=96, num_attention_heads=2, num_key_value_heads=2),
    "one block": dict(num_hidden_layers=1),
    "one head": dict(head_dim=32, num_attention_heads=1, num_key_value_heads=1),
    "no group divides": dict(
        hidden_size=36, head_dim=18, num_attention_heads=2, num_key_value_heads=2, intermediate_size=50
    ),
    "many tokens": dict(vocab_size=40_000),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name == "many tokens" else ()) for name in SHAPES])
@pytest.mark.parametrize(("target", "recipe"), [*KERNELS, ("linux-x64-ort", "w4a8-g32+rtn")])
def test_shapes(tmp_path: Path, texts, name: str, target: str, recipe: str) -> None:
    is_its_reference(run(asked(shaped(tmp_path / "m", **SHAPES[name]), texts, target, recipe), tmp_path / "run").report)


def is_its_reference(report: ValidationReport) -> None:
    """All but quality, which nobody can ask of such a model: bit for bit, and every linear as its kernel promises."""
    assert [check for check in report.checks if check.status != "passed" and check.name != "reference"] == []
    assert report.agreement.top1 == report.agreement.bit_for_bit == 1
    assert report.layers and all(layer.passed for layer in report.layers)


@pytest.mark.parametrize("change", [infinite, not_a_number], ids=lambda change: change.__name__)
def test_what_is_no_number_is_refused(tmp_path: Path, texts, change) -> None:
    with pytest.raises(InputError, match=r"a weight is not finite .*layers\.0"):
        run(asked(changed(tmp_path / "m", change), texts, "android-xnnpack", "w8a8-dynamic+rtn"), tmp_path / "run")
