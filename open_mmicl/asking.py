"""What is asked of an engine: prompts with their cache keys, and the replies put together again. No torch import.

:class:`Asking` is what our own engine and that of a server have in common.
"""

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_mmicl.answer_cache import AnswerCache, Rate, entry_key
from open_mmicl.errors import NumericError
from open_mmicl.interface.base import AnswerScore, GenerationSettings
from open_mmicl.interface.images import ImageFiles
from open_mmicl.interface.prompts import Prompt

Asked = list[tuple[bytes | None, list[bytes | None]]]
"""For each prompt of a call the keys of its text and of its scores (None: an answer that the model cannot say)."""

DECIMALS = 6  # of a log-probability: below what two ways of batching differ by in fp32
WAIT_SECONDS = 0.2  # between two looks at what another process is computing
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
    """An engine: whatever answers, :meth:`ask` is how, and texts or scores alone are asked for through it.

    Attributes:
        name: the model's. key: of the model and how it answers; every key of the cache begins with it.
        images: the image files. cache: None where nothing is kept. kind: the kind of device, for rates.
    """

    name: str
    key: str
    images: ImageFiles
    kind: str

    def __init__(self, cache_path: Path | None) -> None:
        self.stats, self._model_row = EngineStats(), 0
        self.cache = AnswerCache(cache_path) if cache_path is not None else None

    def ask(
        self,
        prompts: Sequence[Prompt],
        generation: GenerationSettings | None,
        answers: Sequence[Sequence[tuple[str, bool]]] | None,
        progress: str | None = None,
    ) -> list[Reply]:
        """Generate and score in one go: a prompt's generation and all its scores share one prefill.

        Args:
            generation: settings of the generated text, or None for no generation.
            answers: (answer, end) pairs to score for each prompt (see :meth:`score`), or None.
            progress: label of a progress bar.

        Raises:
            UsageError: a prompt longer than the model reads, or out of memory with a single prompt; a server that
                cannot do what is asked (scores, beams), does not take a prompt, or is another one than before.
            NumericError: a non-finite score or logit; nothing of its pass is kept.
            MissingInputError, DamagedInputError: an image file, or the answer cache; no server answers for longer than
                ``patience_s``, or not in the right form.
        """
        requests, asked = collect(self.key, self.images, prompts, generation, answers, self.scorable)
        started, stats = time.perf_counter(), self.stats
        found = self.cache.get([key for request in requests for key in request.keys()]) if self.cache else {}
        lacking = [i for i, request in enumerate(requests) if request.missing(found)]
        stats.prompts += len(requests)
        stats.cache_hits += len(requests) - len(lacking)
        if lacking:
            self._begin()
            computed, before = stats.computed, self._work()
            self._find(requests, lacking, found, generation, progress)
            computed = stats.computed - computed
            stats.cache_hits += len(lacking) - computed  # another process has computed these
            work = [now - then for now, then in zip(self._work(), before, strict=True)]
            self._account("generate" if generation else "score", computed, work, time.perf_counter() - started)
        stats.seconds += time.perf_counter() - started
        return replies_of(found, asked)

    @abstractmethod
    def scorable(self, answer: str) -> bool:
        """Whether the model can say exactly this answer (see :meth:`score`)."""

    def close(self) -> None:
        """Close the answer cache."""
        if self.cache:
            self.cache.close()

    @abstractmethod
    def _begin(self) -> None:
        """See to what has to be there before the first prompt is computed."""

    @abstractmethod
    def _work(self) -> tuple[int, int, int, int]:
        """(forward passes or requests, images encoded, tokens computed, and with padding) so far."""

    @abstractmethod
    def _find(
        self,
        requests: list[Request],
        lacking: list[int],
        found: dict[bytes, list],
        generation: GenerationSettings | None,
        progress: str | None,
    ) -> None:
        """Put what requests lack into ``found`` and the cache, as it comes; counts ``stats.computed``."""

    def _look_up(self, requests: dict[int, Request], found: dict[bytes, list]) -> dict[int, Request]:
        """What some requests still lack when all that the cache holds of them is ``found``."""
        lacking = [key for request in requests.values() for key in request.keys() if key not in found]
        found.update(self.cache.get(lacking))
        return {i: left for i, request in requests.items() if (left := request.missing(found))}

    def _keep(self, fresh: list[tuple[str, bytes, list]], found: dict[bytes, list], claim: bytes | None = None) -> None:
        """Write (kind, key, value) entries into ``found`` and the cache; what was written there first holds for all."""
        found.update({key: value for _, key, value in fresh})
        if self.cache and not self.cache.put(self._model_row, fresh, claim):
            found.update(self.cache.get([key for _, key, _ in fresh]))

    def _account(self, kind: str, computed: int, work: Sequence[int], seconds: float) -> None:
        passes, images, tokens, padded = work
        stats = self.stats
        stats.passes += passes
        stats.images_encoded += images
        stats.tokens_computed += tokens
        stats.tokens_padded += padded
        if self.cache and computed:
            self.cache.add_rate(self._model_row, kind, self.kind, Rate(computed, tokens, images, seconds))

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
