"""A bundle as a model of lm-eval, named `afq` there: every task of the harness runs on the exported artifact.

Imports lm-eval; `library.require_lm_eval` comes first. Tokens are cut and scored as lm-eval's Hugging Face model does
it, so that figures of both are of the same thing.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor

from afq_export.errors import InputError
from afq_export.guard.subject import open_subject
from afq_export.runtime.session import Session

GENERATED = 256
"""Most tokens that a task without a number of its own generates, as in lm-eval."""


class SessionLM(TemplateLM):
    """A `Session` with its tokenizer.

    What two sequences in a row have in common at their beginning is computed once: the choices of a question follow
    each other. `truncate`: a sequence beyond the context loses its beginning, as lm-eval does it; else InputError.
    """

    def __init__(
        self, session: Session, tokenizer: Any, *, truncate: bool = False, max_gen_toks: int = GENERATED
    ) -> None:
        super().__init__()
        self.session, self.tokenizer = session, tokenizer
        self.truncate, self.max_gen_toks = truncate, max_gen_toks
        self.max_length = session.context
        self._seen: list[int] = []

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id before an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; with the tokenizer's own beginning, unless the text has it already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context that lm-eval cuts."""
        sums = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            sums.append(sum(self._score(*utils.make_disjoint_window(window))[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to the first of the task's stop texts. Raises InputError where it samples."""
        texts = []
        for context, arguments in (request.args for request in requests):
            asked = normalize_gen_kwargs(arguments, self.max_gen_toks)
            if asked.get("do_sample") and asked.get("temperature"):
                raise InputError("the task draws random tokens", why="the bundle's decoding is greedy")
            ends = handle_stop_sequences(asked.get("until"), eos=self.tokenizer.decode([self.eot_token_id]))
            texts.append(self._continue(context, ends, asked["max_gen_toks"]))
            self.cache_hook.add_partial("generate_until", (context, arguments), texts[-1])
        return texts

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = []
        for key, context, continuation in requests:
            scores.append(self._score(context, continuation))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, scores[-1])
        return scores

    @torch.no_grad()
    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of the continuation, and whether it is what greedy decoding gives."""
        if not context or not continuation:
            raise InputError("nothing to score", why="no token is left for the context or the continuation")
        ids = self._fitting((context + continuation)[:-1], self.max_length)
        rows_TV = self._rows(ids, len(ids) - len(continuation))
        wanted = torch.tensor(continuation)
        # In float32, as lm-eval does it: float64 would part from it by 2e-4 in 100 nats.
        logs = rows_TV.log_softmax(-1).gather(1, wanted[:, None])
        return float(logs.sum()), bool((rows_TV.argmax(-1) == wanted).all())

    def _continue(self, context: str, ends: list[str], tokens: int) -> str:
        ids = self._fitting(self.tok_encode(context), self.max_length - tokens)
        generated: list[int] = []
        while len(generated) < tokens:
            generated.append(int(self._rows(ids + generated, len(ids) + len(generated) - 1)[-1].argmax()))
            text = self.tokenizer.decode(generated)
            if any(end and end in text for end in ends):
                break
        return postprocess_generated_text(
            self.tokenizer.decode(generated, skip_special_tokens=True), ends, think_end_token=None
        )

    def _rows(self, ids: list[int], first: int) -> Tensor:
        """Float32 logits [T, V] of `ids` from position `first` on."""
        pairs = zip(ids, self._seen, strict=False)
        position = min(sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)), first)
        self._seen = []  # an extension that fails leaves nothing to build on
        rows_TV = self.session.extend(torch.tensor(ids[position:]), position)
        self._seen = ids
        return rows_TV[first - position :]

    def _fitting(self, ids: list[int], length: int) -> list[int]:
        if len(ids) > length and not (self.truncate and length > 0):
            raise InputError(
                "a text does not fit the bundle's context",
                where=repr(self.tokenizer.decode(ids[:12])),
                why=f"{len(ids)} tokens, {max(length, 0)} fit",
                do="lower with a larger context, or let it lose its beginning with truncate=True",
            )
        return ids[-length:]


@register_model("afq")
class BundleLM(SessionLM):
    """The bundle at a path, in its runtime: `--model afq --model_args bundle=PATH`."""

    def __init__(
        self,
        bundle: str,
        truncate: bool = False,
        max_gen_toks: int = GENERATED,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """`batch_size`, `max_batch_size` and `device` are what lm-eval gives every model; a bundle has its own."""
        subject = open_subject(bundle)
        super().__init__(subject.session, subject.tokenizer, truncate=truncate, max_gen_toks=max_gen_toks)
