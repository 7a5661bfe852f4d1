"""Documents of our own in the forms of the data sets, the same in the hub's forms, and sessions that need no file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TEXTS = (
    ("The cat sat on the", ("mat and slept.", "moon", "tree in the big garden"), 0),
    ("Tom had a red", ("ball.", "very small idea of a dog", "no"), 2),
    ("One day, she went to the park and saw", ("a big dog.", "of", "it"), 0),
    ("The sun was", ("hot.", "sad and blue all night"), 1),
)


def _questions(form: str, count: int = 4) -> list[dict[str, Any]]:
    return [
        {"query": form.format(text), "choices": list(choices)[:count], "gold": min(gold, count - 1)}
        for text, choices, gold in TEXTS
    ]


QUESTIONS = {
    "arc_easy": _questions("Question: {} what?"),
    "arc_challenge": _questions("Question: {} why?"),
    "piqa": _questions("Question: {}\n", count=2),
    "openbook_qa": _questions("{}"),
    "copa": _questions("{}, because", count=2),
}
"""File name without its suffix -> records."""
BLANKS = [
    {"context_options": ["Ann met Sue and Ann", "Ann met Sue and Sue"], "continuation": "was glad.", "gold": 0},
    {
        "context_options": ["The cup or the mug, the cup", "The cup or the mug, the mug"],
        "continuation": "fell.",
        "gold": 1,
    },
]
ENDINGS = """Cooking: A man stands in a kitchen. the old man
2
cuts an onion.
sings [aside] loudly.
eats.
leaves the house.
Home: How to wash a cup. Take water. It should be warm.
0
Then take soap.
Then leave.
Buy a new one [step] Sell it.
Sleep.
"""
"""HellaSwag's text form."""

HUB = {
    "arc_easy": {"question": "The cat sat on the what?", "answerKey": "A",
                 "choices": {"label": ["A", "B", "C"], "text": list(TEXTS[0][1])}},
    "arc_challenge": {"question": "The cat sat on the why?", "answerKey": "A",
                      "choices": {"label": ["A", "B", "C"], "text": list(TEXTS[0][1])}},
    "piqa": {"goal": "The cat sat on the", "sol1": TEXTS[0][1][0], "sol2": TEXTS[0][1][1], "label": 0},
    "openbookqa": {"question_stem": "The cat sat on the", "answerKey": "A",
                   "choices": {"label": ["A", "B", "C"], "text": list(TEXTS[0][1])}},
    "copa": {"premise": "The cat sat on the,.", "question": "cause", "choice1": "Mat and slept.", "choice2": "Moon",
             "label": 0},
    "winogrande": {"sentence": "Ann met Sue and _ was glad.", "option1": "Ann", "option2": "Sue", "answer": "1"},
    "hellaswag": {"activity_label": "Cooking", "ctx_a": "A man stands in a kitchen.", "ctx_b": "the old man",
                  "endings": ["cuts an onion.", "sings [aside] loudly.", "eats.", "leaves the house."], "label": "2"},
}  # fmt: skip
"""Task -> the first document of our files as the hub has it."""


class TorchSession:
    """`Session` of a Hugging Face model, without a cache: every call computes everything, and is counted."""

    def __init__(self, model: Any, context: int) -> None:
        self.model, self.context, self.prefill = model.eval(), context, context
        self.vocab = model.config.vocab_size
        self.calls: list[tuple[int, int]] = []
        self._ids = torch.empty(0, dtype=torch.long)

    def logits(self, ids: Tensor) -> Tensor:
        return self.extend(ids, 0)

    @torch.no_grad()
    def extend(self, ids: Tensor, position: int) -> Tensor:
        assert position <= len(self._ids) and len(ids)
        self.calls.append((position, len(ids)))
        self._ids = torch.cat([self._ids[:position], ids])
        return self.model(self._ids[None]).logits[0, position:].float()

    def generate(self, ids: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
        raise NotImplementedError
