"""What is asked of an engine: prompts with their cache keys, and the replies put together again. No torch import.

:class:`Asking` is what our own engine and that of a server have in common.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from open_mmicl.answer_cache import entry_key
from open_mmicl.errors import NumericError
from open_mmicl.interface.base import AnswerScore, GenerationSettings
from open_mmicl.interface.prompts import Prompt

Asked = list[tuple[bytes | None, list[bytes | None]]]
"""For each prompt of a call the keys of its text and of its scores (None: an answer that the model cannot say)."""

DECIMALS = 6  # of a log-probability: below what two ways of batching differ by in fp32
_NEVER_SAID = AnswerScore(float("-inf"), 0)


@dataclass
class EngineStats:
    """Totals since the engine was loaded.

    ``prompts``: distinct prompts per call, of which ``cache_hits`` needed no model and ``computed`` did. ``*_naive``:
    what the naive path computes for the latter (every image of every forward pass; generation's prefill once per
    beam). ``tokens_padded`` counts padding too; ``seconds`` is time in calls; ``shrinks``: halvings of the budget.
    """

    prompts: int = 0
    cache_hits: int = 0
    computed: int = 0
    passes: int = 0
    images_encoded: int = 0
    images_naive: int = 0
    tokens_computed: int = 0
    tokens_padded: int = 0
    tokens_naive: int = 0
    seconds: float = 0.0
    shrinks: int = 0


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """What a list of prompts costs: prompts, distinct images, images and tokens of the naive path."""

    prompts: int
    distinct_images: int
    images: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What was asked of one prompt: the generated text (None if none was asked for) and the scores, in order."""

    text: str | None
    scores: list[AnswerScore]


@dataclass(slots=True)
class Request:
    """One distinct prompt of a call and the cache keys of what is asked of it."""

    prompt: Prompt
    text: bytes | None = None
    scores: dict[tuple[str, bool], bytes] = field(default_factory=dict)

    def keys(self) -> list[bytes]:
        """Every key."""
        return [*([self.text] if self.text else []), *self.scores.values()]

    def missing(self, found: dict[bytes, list]) -> "Request | None":
        """What of it is not found yet."""
        text = self.text if self.text is not None and self.text not in found else None
        scores = {pair: key for pair, key in self.scores.items() if key not in found}
        return Request(self.prompt, text, scores) if text or scores else None


class Asking(ABC):
    """An engine: whatever answers, :meth:`ask` is how, and texts or scores alone are asked for through it."""

    @abstractmethod
    def ask(
        self,
        prompts: Sequence[Prompt],
        generation: GenerationSettings | None,
        answers: Sequence[Sequence[tuple[str, bool]]] | None,
        progress: str | None = None,
    ) -> list[Reply]:
        """A reply to each prompt: its text where ``generation``, and the scores of its (answer, end) pairs."""

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[str]],
        end: bool = False,
        progress: str | None = None,
    ) -> list[list[AnswerScore]]:
        """Teacher-forced log P(answer | prompt) of each prompt's answers.

        Args:
            answers: one list per prompt; blanks around an answer do not count. One that the model cannot say (empty, a
                control token in it, characters that its tokenizer has not) has probability 0: log_prob -inf, 0 tokens.
            end: add the log-probability of the token that ends the turn (it then counts in ``n_tokens``).
            progress: label of a progress bar.

        Raises: as :meth:`ask`; UsageError where a server gives no log-probabilities of given tokens.
        """
        asked = [[(answer, end) for answer in some] for some in answers]
        return [reply.scores for reply in self.ask(prompts, None, asked, progress)]

    def generate(
        self, prompts: Sequence[Prompt], settings: GenerationSettings | None = None, progress: str | None = None
    ) -> list[str]:
        """Generated answers, raw text without special tokens, uncut. Raises: as :meth:`ask`."""
        replies = self.ask(prompts, settings or GenerationSettings(), None, progress)
        return [reply.text for reply in replies if reply.text is not None]


def score_entries(name: str, request: Request, scores: Sequence[AnswerScore]) -> list[tuple[str, bytes, list]]:
    """(kind, key, value) of a request's scores for the answer cache. Raises: NumericError: one is not finite."""
    entries = []
    for ((answer, _), key), score in zip(request.scores.items(), scores, strict=True):
        if not abs(score.log_prob) < float("inf"):
            raise NumericError(f"{name}: the log-probability of {answer!r} is {score.log_prob}")
        entries.append(("score", key, [round(score.log_prob, DECIMALS), score.n_tokens]))
    return entries


def collect(
    model: str,
    files: Any,
    prompts: Sequence[Prompt],
    generation: GenerationSettings | None,
    answers: Sequence[Sequence[tuple[str, bool]]] | None,
    scorable: Callable[[str], bool],
) -> tuple[list[Request], Asked]:
    """The distinct prompts of a call with the cache keys of what is asked of each, and each prompt's own keys.

    Args:
        model: the engine's key. files: an :class:`~open_mmicl.interface.images.ImageFiles`.
        generation, answers: as in ``ask`` of the engines. scorable: whether the model can say an answer.
    """
    wanted: dict[bytes, Request] = {}
    asked: Asked = []
    stem_of = _stems(model, files)
    for prompt, some in zip(prompts, answers or [()] * len(prompts), strict=True):
        stem = stem_of(prompt)
        request = wanted.setdefault(stem, Request(prompt))
        if generation is not None and request.text is None:
            kind = (generation.max_new_tokens, generation.num_beams, float(generation.length_penalty))
            request.text = entry_key(stem, "generate", kind)
        pairs = [(answer.strip(), end) for answer, end in some]
        for answer, end in pairs:
            if (answer, end) not in request.scores and scorable(answer):
                request.scores[answer, end] = entry_key(stem, "score", (end, answer))
        asked.append((request.text, [request.scores.get(pair) for pair in pairs]))
    return [request for request in wanted.values() if request.keys()], asked


def replies_of(found: dict[bytes, list], asked: Asked) -> list[Reply]:
    """Each prompt's reply from the values of all keys."""
    return [
        Reply(
            found[text][0] if text is not None else None,
            [AnswerScore(*found[key]) if key is not None else _NEVER_SAID for key in keys],
        )
        for text, keys in asked
    ]


def _stems(model: str, files: Any) -> Callable[[Prompt], bytes]:
    """Hash of model and prompt, with which every key of the prompt begins; each file and demonstration hashed once."""
    digest, stem = functools.cache(files.digest), model.encode()

    @functools.cache
    def part(image: str, question: str, answer: str | None) -> bytes:
        return entry_key(digest(image), "query" if answer is None else "demo", (question, answer or ""))

    def stem_of(prompt: Prompt) -> bytes:
        parts = [part(demo.image, demo.question, demo.answer) for demo in prompt.demos]
        return entry_key(stem, "prompt", (b"".join(parts).hex(), part(prompt.image, prompt.question, None).hex()))

    return stem_of
