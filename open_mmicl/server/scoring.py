"""Log-probabilities of given answers, out of what vLLM's server gives: by token ids, or of a whole prompt's tokens.

``token_ids``: answers share their beginnings, so they are a tree; each inner node is one request that generates one
token behind prompt and beginning, and asks for the log-probabilities of the node's branches (``logprob_token_ids``).
The server's prefix cache holds the prompt. ``prompt_logprobs``: one request for each answer, in which all tokens of the
conversation are scored; vLLM then computes the whole prompt each time.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from openai.types.chat import ChatCompletion

from open_mmicl.errors import DamagedInputError, UsageError
from open_mmicl.interface.base import AnswerScore
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.lazy import lazy

layout = lazy("open_mmicl.interface.layout")
loading = lazy("open_mmicl.interface.loading")
templates = lazy("open_mmicl.interface.templates")

_TOKEN = "token_id:{}"
_CACHED_TEXTS = 100_000


class AnswerTokens:
    """The tokens of answers, by the tokenizer and chat template of the model's own files (no weights are read)."""

    def __init__(self, reference: InferModelConfig):
        folder = loading.model_dir(reference)
        self.tokenizer = loading.load_tokenizer(folder)
        template = templates.find(reference, folder, self.tokenizer.chat_template).text
        words, special = reference.prompt_format, layout.special_ids(self.tokenizer)

        def render(messages: list[dict], generation: bool) -> str:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, chat_template=template
            )

        self._span = lru_cache(_CACHED_TEXTS)(
            lambda answer: layout.answer_span(self.tokenizer, render, words, answer, special)
        )
        self.beginning = lru_cache(_CACHED_TEXTS)(self._beginning)

    def of(self, answer: str, end: bool) -> tuple[int, ...]:
        """The answer's tokens in the assistant turn, with the one that ends the turn where ``end``.

        Raises:
            UsageError: the answer cannot be scored.
        """
        ids, closing = self._span(answer.strip())
        return (*ids, *closing[: int(end)])

    def closed(self, answer: str) -> tuple[int, ...]:
        """The answer's tokens and all that close the turn."""
        ids, closing = self._span(answer.strip())
        return (*ids, *closing)

    def _beginning(self, ids: tuple[int, ...]) -> str:
        """The text whose tokens these first tokens of an answer are, so that the server comes to the same ones."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()
        if not text or self._span(text)[0] != ids:
            raise UsageError(
                f"an answer that begins with {text!r} cannot be scored by token ids: as a text this has other tokens; "
                "use scores: prompt_logprobs in the model's YAML"
            )
        return text


def tree(asked: Sequence[tuple[str, bool]], tokens: AnswerTokens) -> dict[tuple[int, ...], list[int]]:
    """{tokens that an answer begins with: the tokens that follow there in any of the (answer, end) pairs}."""
    nodes: dict[tuple[int, ...], dict[int, None]] = {}
    for answer, end in asked:
        ids = tokens.of(answer, end)
        for i, token in enumerate(ids):
            nodes.setdefault(ids[:i], {})[token] = None
    return {beginning: list(following) for beginning, following in nodes.items()}


def sums(
    asked: Sequence[tuple[str, bool]], tokens: AnswerTokens, found: dict[tuple[int, ...], dict[int, float]]
) -> list[AnswerScore]:
    """The pairs' scores from the log-probabilities at each node of their :func:`tree`."""
    scores = []
    for answer, end in asked:
        ids = tokens.of(answer, end)
        scores.append(AnswerScore(math.fsum(found[ids[:i]][token] for i, token in enumerate(ids)), len(ids)))
    return scores


def node_fields(following: Sequence[int]) -> dict[str, Any]:
    """Request fields that ask for the log-probabilities of these tokens at the next position."""
    return {"logprobs": True, "logprob_token_ids": list(following), "return_tokens_as_token_ids": True}


def node_values(answer: ChatCompletion, following: Sequence[int]) -> dict[int, float] | None:
    """Log-probabilities of the tokens asked for, None where the server did not give them."""
    shown = answer.choices[0].logprobs
    if shown is None or not shown.content:
        return None
    first = shown.content[0]
    given = {entry.token: entry.logprob for entry in (first, *(first.top_logprobs or []))}
    if any(_TOKEN.format(token) not in given for token in following):
        return None
    return {token: given[_TOKEN.format(token)] for token in following}


def prompt_values(answer: ChatCompletion, wanted: Sequence[int] | None = None) -> list[float] | None:
    """Log-probabilities of the prompt's last tokens, None where the server gave none.

    Args:
        wanted: the ids that those tokens must be; without them the last three, whatever they are.

    Raises:
        DamagedInputError: the prompt ends with other tokens.
    """
    given = (answer.model_extra or {}).get("prompt_logprobs")
    if not isinstance(given, list) or len(given) < 4 or not all(isinstance(entry, dict) for entry in given[-3:]):
        return None
    if wanted is None:
        return [next(iter(entry.values()))["logprob"] for entry in given[-3:]]
    tail = given[len(given) - len(wanted) :]
    if any(str(token) not in entry for token, entry in zip(wanted, tail, strict=True)):
        raise DamagedInputError(
            "the server's prompts end with other tokens than the reference model's: another tokenizer or chat template"
        )
    return [entry[str(token)]["logprob"] for token, entry in zip(wanted, tail, strict=True)]
