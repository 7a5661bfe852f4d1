"""Every runtime at the edges of a sequence: one token, the last place of its cache, one past it; and odd sizes.

The right result, or a refusal with the reason. What is not installed is skipped; targets that nothing here runs are
held to what is read back from their file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from afq_export.backends import backend
from afq_export.cli import call
from afq_export.errors import InputError
from afq_export.load.config import read_config
from afq_export.pipeline import Outcome
from afq_export.runtime.session import Session
from afq_export.spec.request import Request
from tests.end_to_end.runs import run
from tests.models import VOCAB, edit_config, random_tensors, write_model

MAX = 48
"""Positions that the model has; targets with programs of a fixed size get as many places."""
STATIC = f"[shapes]\ncontext = {MAX}\nprefill = 16\n"
RUNS = {
    "android-xnnpack": ("w8a8-dynamic+rtn", (), ""),
    "linux-x64-ort": ("w4a8-g32+rtn", (), ""),
    "android-ort": ("w8a8-static+rtn", (), ""),
    "linux-arm64-ort": ("w8a8-dynamic+rtn", (), ""),
    "intel-openvino": ("w8a8-dynamic+rtn", ("openvino",), ""),
    "android-qnn-htp": ("w8a16-static+rtn", ("onnxruntime_qnn",), STATIC),
    "ethos-u85": ("w8a8-static+rtn", ("tosa_serializer", "tosa_reference_model", "ethosu"), STATIC),
}
"""Target -> recipe, the modules that run it, what the test's target changes."""
COMPILED = {
    "cortex-m55": ("w8a8-static+rtn", ("tosa_serializer",), ""),
    "ios-coreml": ("w4a16-g32+rtn", ("coremltools",), ""),
    "android-vulkan": ("w4a8-g32-all4+rtn", (), ""),
}
Made = Callable[..., Outcome]


def shaped(folder: Path, **sizes: int) -> Path:
    """A random Llama with MAX positions and other sizes; of three tokens, with a tokenizer of three letters."""
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1} if sizes.get("vocab_size", VOCAB) < VOCAB else {}
    edit_config(write_model(folder), **{"max_position_embeddings": MAX, **sizes, **ends})
    config, _ = read_config(folder)
    save_file(random_tensors(config), folder / "model.safetensors")
    if ends:
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="c"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Runs of such models, each once."""
    folder, done = tmp_path_factory.mktemp("limits"), {}
    for name, text in (("calib", "abcdefgh bca\n" * 40), ("eval", "hgfedcba cab\n" * 40)):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")

    def outcome(target: str, **sizes: int) -> Outcome:
        recipe, modules, changes = (RUNS | COMPILED)[target]
        for module in modules:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{target} needs the module {module}")
        key = (target, *sorted(sizes.items()))
        if key not in done:
            here = folder / str(len(done))
            own = here / "own.toml"
            model = shaped(here / "model", **sizes)
            own.write_text(f'base = "{target}"\nname = "{target}-own"\n{changes}', encoding="utf-8")
            request = Request(
                model=str(model), target=str(own) if changes else target, recipe=recipe, window=24, eval_windows=1,
                threads=1, calib=str(folder / "calib.txt"), eval=str(folder / "eval.txt"),
                changes=("samples.windows=2", "samples.length=24"),
            )  # fmt: skip
            done[key] = run(request, here / "run")
        return done[key]

    return outcome


def opened(outcome: Outcome) -> Session:
    return backend(outcome.bundle.backend).open_session(outcome.bundle)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal choices, and logits equal but for float sums that calls of other sizes order differently."""
    same = bool((found.argmax(-1) == expected.argmax(-1)).all())
    return same and bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


@pytest.mark.parametrize("target", RUNS)
def test_the_ends_of_a_sequence(made: Made, target: str) -> None:
    session = opened(made(target))
    ids = torch.arange(session.context + 1) * 7 % 256
    assert session.context == MAX
    whole = session.logits(ids[:-1])
    assert whole.shape == (MAX, VOCAB) and whole.isfinite().all()
    assert close(session.logits(ids[:1]), whole[:1])
    session.logits(ids[: MAX - 1])
    assert close(session.extend(ids[MAX - 1 : MAX], MAX - 1), whole[-1:]), "the last place of the cache"
    beyond = {
        "longer than the program's context": [
            lambda: session.logits(ids),
            lambda: session.extend(ids[:1], MAX),
            lambda: session.extend(ids[:2], MAX - 1),
            lambda: session.generate(ids, 1, frozenset()),
        ],
        "must be one sequence": [lambda: session.logits(ids[:0]), lambda: session.extend(ids[:0], 3)],
        "outside the vocabulary": [
            lambda: session.logits(torch.tensor([1, VOCAB])),
            lambda: session.logits(torch.tensor([-1])),
        ],
    }
    for why, calls in beyond.items():
        for asked in calls:
            with pytest.raises(InputError, match=why):
                asked()
    assert torch.equal(session.logits(ids[:-1]), whole), "a refusal leaves nothing behind"


@pytest.mark.parametrize("target", RUNS)
def test_generation_ends_where_the_context_ends(made: Made, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written fills the cache and is followed by one last choice; no step goes past it."""
    outcome = made(target)
    session = opened(outcome)
    prompt = torch.arange(MAX) % 256
    for given in (MAX, MAX - 2):
        found = session.generate(prompt[:given], 100, frozenset())
        assert len(found) == MAX - given + 1
    rows = session.logits(torch.cat((prompt[: MAX - 2], torch.tensor(found[:2]))))
    assert rows[MAX - 3 :].argmax(-1).tolist() == found
    bundle = str(outcome.bundle.folder)
    assert call(["generate", bundle, "--prompt", "x" * (MAX + 1)]) == 2
    assert "longer than the program's context" in capsys.readouterr().err
    assert call(["perplexity", bundle, "--window", str(MAX + 1), "--windows", "1"]) == 2
    assert f"2 to {MAX} tokens fit here" in capsys.readouterr().err


SIZES = {
    "heads of 80": dict(hidden_size=160, head_dim=80, num_attention_heads=2, num_key_value_heads=1),
    "heads of 96": dict(hidden_size=96, head_dim=96, num_attention_heads=2, num_key_value_heads=2),
    "three tokens": dict(vocab_size=3),
    "262144 tokens": dict(vocab_size=1 << 18),
}
REFUSED = {
    ("cortex-m55", "262144 tokens"): "does not fit into the target's flash",
    ("ethos-u85", "262144 tokens"): "does not fit into the target's SRAM",
    ("android-vulkan", "three tokens"): "a multiple of 4 outputs, not 3",
}
"""Sizes that a target has no place or no kernel for, and what it says."""
SLOW = {
    (target, name)
    for target in (*RUNS, *COMPILED)
    for name in SIZES
    if name in ("heads of 80", "262144 tokens") or target in ("linux-arm64-ort", "android-vulkan")
}
CASES = [
    pytest.param(target, name, marks=pytest.mark.slow if {(target, name)} & SLOW - REFUSED.keys() else ())
    for target in (*RUNS, *COMPILED)
    for name in SIZES
]


@pytest.mark.parametrize(("target", "name"), CASES)
def test_sizes(made: Made, target: str, name: str) -> None:
    """All but quality, which nobody can ask of such a model."""
    if (target, name) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[target, name]):
            made(target, **SIZES[name])
        return
    report = made(target, **SIZES[name]).report
    failed = {check.name: check.detail for check in report.checks if check.status == "failed"}
    assert {name: why for name, why in failed.items() if name not in ("reference", "perplexity")} == {}
    passed = {check.name for check in report.checks if check.status == "passed"}
    assert "integers" in passed and (report.layers or target in COMPILED)
    assert all(layer.passed for layer in report.layers)
    assert report.verdict in ("compiled" if target in COMPILED else "pass", "fail"), "fail: of the two above"
