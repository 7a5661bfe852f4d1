"""Train the two small demo models of afq-export: one Llama-style, one OPT-style.

The toolchain needs models that are small enough to live in the repository and yet really trained, so
that the effect of a quantization can be seen in their perplexity.  This script makes them from one plain
text file of TinyStories, deterministically (fixed seed, fixed thread count):

1. the text is cleaned and cut into documents; the last tenth of the documents is held out;
2. a byte-level BPE tokenizer of 1024 tokens is learnt on the training part, and shared by both models;
3. each model is trained on random windows, with early stopping on the held-out part;
4. each model is saved as float16 safetensors, read back in float32 and measured again.

Figures go to ``training.json`` beside the model folders.  Run it from the root, with the text there:

    python examples/demo/train.py --data tinystories_val.txt --out examples/demo
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

SEED = 20240607
VOCAB = 1024
CONTEXT = 512
MIN_WINDOW = 256
BOS, EOS, BOS_ID, EOS_ID = "<s>", "</s>", 0, 1
HELD_OUT_PART = 0.10
REQUIRED_GAIN = 4.0
DEFAULT_STEPS = {"llama": 900, "opt": 1200}
FAMILIES = tuple(DEFAULT_STEPS)

# UTF-8 punctuation once read as cp1252: "\u00e2\u20ac" and a third character, here with its ASCII meaning.
# The rest are double quotes; the closing one has lost its third character (0x9d is undefined in cp1252).
MOJIBAKE = re.compile("\u00e2\u20ac([\u0153\u2122\u02dc\u201c\u201d\u0160\u00a6]?)")
MOJIBAKE_MEANING = {"\u2122": "'", "\u02dc": "'", "\u201c": "-", "\u201d": " - ", "\u0160": "", "\u00a6": "..."}
STORY_OPENING = re.compile(r"Once\b|There once\b|One (\w+ )?day,? (a|an) (\w+ ){1,3}named\b")
CAST_OPENING = re.compile(
    r"([A-Z][a-z]+)(?: and ([A-Z][a-z]+))? (?:was|is|were|are|had|has|likes?|liked|loves?|loved|wants?|wanted)\b"
)
STRONG_OPENING = re.compile(
    r"[A-Z][a-z]+(?: and [A-Z][a-z]+)? (?:(?:likes?|liked|loves?|loved) to\b"
    r"|(?:is|are|was|were) (?:playing|friends|best friends|twins|brother|in the|at the|bored|a \w+ (?:\w+ )?who)\b)"
)
THE_END = re.compile(r"the end\W*$", re.IGNORECASE)
NOT_NAMES = re.compile(
    r"(He|She|It|They|We|You|This|That|There|Everyone|Everything|Nobody|All|Both|Mom|Mum|Mommy|Mama|Dad|Daddy)$"
)


@dataclass(frozen=True)
class Recipe:
    """Settings of the optimisation, the same for both families."""

    batch: int = 4
    peak_lr: float = 2.5e-3
    floor_lr: float = 1e-4
    warmup: int = 80
    weight_decay: float = 0.1
    clip: float = 1.0
    eval_every: int = 60
    patience: int = 5
    bos_share: float = 0.25


# ------------------------------------------------------------------------------------------------ text


def clean(text: str) -> str:
    """Undo the mojibake, normalise line ends and strip the blanks around lines."""
    text = MOJIBAKE.sub(lambda found: MOJIBAKE_MEANING.get(found.group(1), '"'), text)
    return "\n".join(line.strip() for line in text.replace("\r\n", "\n").split("\n"))


def opens_story(paragraph: str, story: list[str]) -> bool:
    """Tell whether `paragraph` begins a new story, when `story` holds the paragraphs read before it.

    The file separates stories exactly as it separates paragraphs, by one blank line; so a story is
    recognised by its opening formula, by what precedes it ("The end."), or by presenting a new cast.
    """
    if not story:
        return False
    if STORY_OPENING.match(paragraph) or THE_END.match(story[-1]):
        return True
    cast = CAST_OPENING.match(paragraph)
    if cast is None or len(story) < 2:
        return False
    names = {name for name in cast.groups() if name}
    if any(NOT_NAMES.match(name) for name in names):
        return False
    if len(story) >= 4 and STRONG_OPENING.match(paragraph):
        return True
    so_far = "\n".join(story)
    return not any(re.search(rf"\b{name}\b", so_far) for name in names)


def split_documents(text: str) -> list[str]:
    """Cut the cleaned text into stories; `<|endoftext|>` always ends one."""
    documents: list[str] = []
    for part in text.split("<|endoftext|>"):
        story: list[str] = []
        for paragraph in filter(None, (p.strip() for p in re.split(r"\n\s*\n", part))):
            if opens_story(paragraph, story):
                documents.append("\n\n".join(story))
                story = []
            story.append(paragraph)
        if story:
            documents.append("\n\n".join(story))
    return documents


def split_held_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return (training documents, held-out documents): the last tenth is held out."""
    cut = len(documents) - max(1, round(len(documents) * HELD_OUT_PART))
    return documents[:cut], documents[cut:]


# ------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Learn the byte-level BPE; it adds no special token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != VOCAB or tokenizer.token_to_id(EOS) != EOS_ID:
        raise RuntimeError("the text is too small for the vocabulary, or the special tokens are misplaced")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, under the class name known to transformers 4 and 5."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """One stream of token ids, every document followed by `</s>`."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids.extend(encoding.ids)
        ids.append(EOS_ID)
    return torch.tensor(ids, dtype=torch.long)


# ---------------------------------------------------------------------------------------------- models


def build(family: str) -> PreTrainedModel:
    """Make a fresh model of the family, about 1.1 million parameters (all weights drawn with std 0.02)."""
    torch.manual_seed(SEED)
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
    }
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                **shared,
                intermediate_size=512,
                num_hidden_layers=4,
                num_key_value_heads=2,
                head_dim=32,
                rope_theta=10000.0,
                initializer_range=0.02,
            )
        )
    return OPTForCausalLM(
        OPTConfig(
            **shared,
            ffn_dim=512,
            num_hidden_layers=5,
            word_embed_proj_dim=128,
            activation_function="relu",
            do_layer_norm_before=True,
            enable_bias=True,
            dropout=0.0,
            layerdrop=0.0,
            init_std=0.02,
        )
    )


# ------------------------------------------------------------------------------------------- measuring


def unigram_perplexity(train: torch.Tensor, targets: torch.Tensor) -> float:
    """Perplexity of `targets` under the token frequencies of `train` (add-one smoothing)."""
    counts = torch.bincount(train, minlength=VOCAB).double() + 1.0
    return math.exp(-torch.log(counts / counts.sum())[targets].mean().item())


@torch.no_grad()
def perplexity(model: PreTrainedModel, stream: torch.Tensor) -> float:
    """Perplexity of every token of `stream` but the first, in successive windows of the full context."""
    model.eval()
    total = 0.0
    for start in range(0, len(stream) - 1, CONTEXT):
        window = stream[start : start + CONTEXT + 1]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
        total += F.cross_entropy(logits.float(), window[1:], reduction="sum").item()
    return math.exp(total / (len(stream) - 1))


# -------------------------------------------------------------------------------------------- training


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warmup, then a cosine down to the floor."""
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    phase = (step - recipe.warmup) / max(1, steps - recipe.warmup)
    return recipe.floor_lr + (recipe.peak_lr - recipe.floor_lr) * 0.5 * (1.0 + math.cos(math.pi * phase))


def draw_batch(stream: torch.Tensor, starts: torch.Tensor, recipe: Recipe, rng: torch.Generator) -> torch.Tensor:
    """Random windows of one random length; some begin with `<s>` and a document, so that `<s>` is learnt."""
    length = int(torch.randint(MIN_WINDOW, CONTEXT + 1, (1,), generator=rng))
    offsets = torch.randint(0, len(stream) - length, (recipe.batch,), generator=rng)
    from_bos = torch.rand(recipe.batch, generator=rng) < recipe.bos_share
    usable = starts[starts + length < len(stream)]
    document = usable[torch.randint(0, len(usable), (recipe.batch,), generator=rng)]
    rows = []
    for row in range(recipe.batch):
        if from_bos[row]:
            rows.append(torch.cat([torch.tensor([BOS_ID]), stream[document[row] : document[row] + length]]))
        else:
            rows.append(stream[offsets[row] : offsets[row] + length + 1])
    return torch.stack(rows)


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; no weight decay on norms and biases."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95), fused=True)


def train(
    model: PreTrainedModel, stream: torch.Tensor, held_out: torch.Tensor, steps: int, recipe: Recipe
) -> dict[str, Any]:
    """Train in place, stop when the held-out part stops improving, and restore the best weights."""
    rng = torch.Generator().manual_seed(SEED)
    starts = torch.cat([torch.tensor([0]), torch.nonzero(stream == EOS_ID).flatten()[:-1] + 1])
    optimizer = make_optimizer(model, recipe)
    best, best_step, best_state, step = math.inf, 0, model.state_dict(), 0
    for step in range(1, steps + 1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, steps, recipe)
        batch = draw_batch(stream, starts, recipe, rng)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if step % recipe.eval_every and step != steps:
            continue
        measured = perplexity(model, held_out)
        print(f"  step {step:5d}  train loss {loss.item():.3f}  held-out perplexity {measured:.3f}", flush=True)
        if measured < best:
            best, best_step, best_state = measured, step, copy.deepcopy(model.state_dict())
        elif step - best_step >= recipe.patience * recipe.eval_every:
            break
    model.load_state_dict(best_state)
    return {"steps_run": step, "best_step": best_step, "held_out_perplexity_float32": round(best, 4)}


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, in float16."""
    half = copy.deepcopy(model).to(torch.float16)
    half.config.dtype = torch.float16
    half.generation_config.bos_token_id = BOS_ID
    half.generation_config.eos_token_id = EOS_ID
    half.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ main


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_family(
    family: str, out: Path, tokenizer: Tokenizer, train_ids: torch.Tensor, held_ids: torch.Tensor, steps: int
) -> dict[str, Any]:
    """Train, save and measure one family; returns its part of training.json."""
    recipe, started, cpu_started = Recipe(), time.monotonic(), time.process_time()
    model = build(family)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{family}: {parameters} parameters", flush=True)
    figures = train(model, train_ids, held_ids, steps, recipe)
    folder = out / family
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    unigram = unigram_perplexity(train_ids, held_ids[1:])
    saved = perplexity(type(model).from_pretrained(folder, dtype=torch.float32), held_ids)
    print(f"{family}: held-out perplexity of the saved file {saved:.3f}, unigram {unigram:.3f}", flush=True)
    if saved * REQUIRED_GAIN > unigram:
        raise SystemExit(f"{family}: not trained enough: {saved:.2f} is not {REQUIRED_GAIN} times below {unigram:.2f}")
    return {
        "parameters": parameters,
        "steps_limit": steps,
        **figures,
        "held_out_perplexity_saved_file": round(saved, 4),
        "held_out_perplexity_unigram": round(unigram, 4),
        "gain_over_unigram": round(unigram / saved, 2),
        "recipe": dict(vars(recipe)),
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
    }


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo models of afq-export.")
    parser.add_argument("--data", type=Path, required=True, help="text file of TinyStories")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives llama/, opt/ and training.json")
    parser.add_argument("--family", choices=(*FAMILIES, "all"), default="all")
    parser.add_argument("--steps", type=int, help=f"upper limit of optimisation steps; default {DEFAULT_STEPS}")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Run the whole recipe."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    raw = arguments.data.read_bytes()
    training, held_out = split_held_out(split_documents(clean(raw.decode("utf-8"))))
    tokenizer = train_tokenizer(training)
    train_ids, held_ids = encode(tokenizer, training), encode(tokenizer, held_out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "data": {"name": arguments.data.name, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()},
        "documents": {"training": len(training), "held_out": len(held_out)},
        "tokens": {"training": len(train_ids), "held_out": len(held_ids)},
        "seed": SEED,
        "threads": arguments.threads,
        "versions": {m.__name__: str(m.__version__) for m in (torch, transformers, tokenizers)},
    }
    for family in FAMILIES if arguments.family == "all" else (arguments.family,):
        steps = arguments.steps or DEFAULT_STEPS[family]
        facts[family] = make_family(family, arguments.out, tokenizer, train_ids, held_ids, steps)
        path = arguments.out / "training.json"
        write_json(path, (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | facts)


if __name__ == "__main__":
    main()
