"""The LVLM engine: every image encoded once, every prompt paid once.

``mode="fast"`` shares prefixes, visual features and prefills (Qwen-VL) or at least batches by length (other models);
``mode="naive"`` is the plain path that it is measured against. Both give the same answers; log-probabilities agree to
1e-4 in fp32. An engine belongs to one process; several processes may share one answer cache.

The composition of forward passes depends on the prompts of the call alone, not on what the cache holds, and one pass
is one transaction: a run that is killed and started again computes the missing passes exactly as they would have been.
"""

import functools
import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from open_mmicl import engine_fast, engine_fixed
from open_mmicl.answer_cache import AnswerCache, Rate, model_key
from open_mmicl.asking import (
    DECIMALS,
    Asking,
    EngineStats,
    Reply,
    Request,
    TokenPlan,
    collect,
    replies_of,
    score_entries,
)
from open_mmicl.errors import NumericError, UnscorableAnswerError, UsageError
from open_mmicl.interface import load_interface
from open_mmicl.interface.base import AnswerScore, GenerationSettings
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.prompts import Prompt
from open_mmicl.lazy import lazy
from open_mmicl.memory import image_budget
from open_mmicl.prefix_tree import fill, windows

server_engine = lazy("open_mmicl.server.engine")
__all__ = ["AnswerScore", "Engine", "EngineStats", "GenerationSettings", "Reply"]

log = logging.getLogger("lever_plus.engine")
MODES = ("fast", "naive")
_WINDOW_BUDGETS = 32  # prompts planned together: as many as fill this many forward passes
_WAIT_SECONDS = 0.2  # between two looks at a pass that another process is computing


@dataclass(slots=True)
class _Unit:
    """Requests answered by one forward pass (numbers of a call's requests); ``plan``, ``leaves``: the fast path's."""

    members: list[int]
    plan: Any = None
    leaves: dict[int, Any] = field(default_factory=dict)


class Engine(Asking):
    """Scores and generates answers with one LVLM, through the answer cache. Made by :meth:`load`."""

    gives_scores, on_server = True, False

    def __init__(self, lvlm: Any, mode: str, cache_path: Path | None, token_budget: int, image_cache_mb: int):
        config = lvlm.config
        self.lvlm, self.mode, self.name, self.fingerprint = lvlm, mode, lvlm.name, lvlm.fingerprint
        self.device = str(lvlm.model.device)
        self.token_budget = token_budget or config.token_budget
        self.stats = EngineStats()
        self._computed = 0  # prompts of the call in progress
        lvlm.full_logits = mode == "naive"
        self._runner: Any = None
        image_bytes = image_budget(lvlm.model.device, image_cache_mb or config.image_cache_mb)
        if lvlm.fast and mode == "fast":
            self._runner = _runner(lvlm, image_bytes, config.kv_cache_mb << 20)
        elif mode == "fast":
            lvlm.share(image_bytes)
        description = {
            "fingerprint": lvlm.fingerprint,
            "prompt_format": config.prompt_format.fingerprint(),
            "dtype": lvlm.dtype_name,
            "processor": lvlm.processor_fingerprint,
            "mode": mode,
            "interface": config.interface,
            "decimals": DECIMALS,
        }
        if self.device == "cpu" and (threads := torch.get_num_threads()) != 1:
            description["threads"] = threads  # they decide the last decimals
        if not lvlm.fast:
            description["features"] = lvlm.features is not None
            if lvlm.shared is not None:
                description["prefill"] = "shared"
        if self.fixed:
            description["rounding"] = self._runner.describe()
        self.key = model_key(description)
        self.cache = AnswerCache(cache_path) if cache_path is not None else None
        self._model_row = self.cache.register(self.key, self.name, description) if self.cache else 0

    @classmethod
    def load(
        cls,
        config: InferModelConfig,
        device: str = "auto",
        mode: str = "fast",
        precision: str = "auto",
        cache_path: Path | None = None,
        token_budget: int = 0,
        image_cache_mb: int = 0,
    ) -> "Engine":
        """Load the model. ``token_budget`` [tokens in a pass], ``image_cache_mb`` [MiB]: 0 takes the configuration's
        (there 0: as free memory allows). With ``interface: openai`` nothing is loaded: the engine returned has the
        same calls, and a server answers.

        Raises:
            MissingInputError, DamagedInputError, UsageError (see :func:`open_mmicl.interface.load_interface`).
        """
        if mode not in MODES:
            raise UsageError(f"ENGINE={mode} is not allowed: {' | '.join(MODES)}")
        if config.interface == "openai":
            return server_engine.ServerEngine.load(config, device, mode, precision, cache_path, cls.load)
        return cls(load_interface(config, device, precision), mode, cache_path, token_budget, image_cache_mb)

    @property
    def fixed(self) -> bool:
        """Whether an answer and a score depend on the prompt alone, to the last bit: the fast path in 16 bit."""
        return self._runner is not None and self._runner.fixed

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
            UsageError: a prompt longer than the model reads, or out of memory with a single prompt.
            NumericError: a non-finite score or logit; nothing of its pass is kept.
            MissingInputError, DamagedInputError: an image file, or the answer cache.
        """
        requests, asked = collect(self.key, self.lvlm.images, prompts, generation, answers, self.scorable)
        return replies_of(self._run(requests, generation, progress), asked)

    def hidden_states(self, prompts: Sequence[Prompt], layers: Sequence[int], pool: str = "last") -> torch.Tensor:
        """Hidden states of prompts at the place of their answer, float32 (N, len(layers), d) on the CPU.

        What :meth:`.hf_chat.HfChat.hidden_batch` gives, in batches by token budget; nothing is kept.

        Raises:
            UsageError: no such layer, or a model that shows none (a server). MissingInputError, DamagedInputError: an
                image file. NumericError: a state that is not finite.
        """
        if not hasattr(self.lvlm, "hidden_batch"):
            raise UsageError(f"{self.name} shows no hidden states: leave lvlm and answer out of EMBEDDING")
        lengths = self.lvlm.prompt_lengths(prompts)
        self._check_window(lengths)
        order = sorted(range(len(prompts)), key=lambda i: lengths[i])
        batches = fill(order, [lengths[i] for i in order], max(1, self.token_budget // 4))  # every layer's states live
        found: list[torch.Tensor | None] = [None] * len(prompts)
        for batch in batches:
            states = self.lvlm.hidden_batch([prompts[i] for i in batch], layers, pool)
            if not torch.isfinite(states).all():
                raise NumericError(f"{self.name}: a hidden state is not finite")
            for i, state in zip(batch, states, strict=True):
                found[i] = state
        return torch.stack(found)

    def answer_embeddings(self, answers: Sequence[str]) -> torch.Tensor:
        """Mean output embedding of each answer's tokens, float32 (N, d) on the CPU.

        Raises:
            UsageError: an answer without tokens, or a model that shows no embeddings (a server).
        """
        if not hasattr(self.lvlm, "answer_embeddings"):
            raise UsageError(f"{self.name} shows no embeddings: use answer_clip instead of answer in EMBEDDING")
        return self.lvlm.answer_embeddings(answers)

    def scorable(self, answer: str) -> bool:
        """Whether the model can say exactly this answer (see :meth:`score`)."""
        try:
            return bool(self.lvlm.answer_ids(answer))
        except UnscorableAnswerError:
            return False

    def plan_tokens(self, prompts: Sequence[Prompt]) -> TokenPlan:
        """What these prompts cost; reads image headers, computes nothing."""
        images = [image for prompt in prompts for image in prompt.images]
        distinct = {self.lvlm.images.digest(path) for path in set(images)}
        return TokenPlan(len(prompts), len(distinct), len(images), sum(self.lvlm.prompt_lengths(prompts)))

    def close(self) -> None:
        """Close the answer cache."""
        if self.cache:
            self.cache.close()

    def _run(self, requests: list[Request], generation: GenerationSettings | None, progress: str | None) -> dict:
        """Values of every key, from the cache or computed pass by pass, each pass written before the next begins."""
        started, before = time.perf_counter(), self._work()
        found = self.cache.get([key for request in requests for key in request.keys()]) if self.cache else {}
        open_now = {i for i, request in enumerate(requests) if request.missing(found)}
        self.stats.prompts += len(requests)
        self.stats.cache_hits += len(requests) - len(open_now)
        if not open_now:
            self.stats.seconds += time.perf_counter() - started
            return found
        self._computed = 0
        prompts = [request.prompt for request in requests]
        pieces = self.lvlm.pieces(prompts) if self._runner else []
        lengths = [sum(piece.length for piece in some) for some in pieces]
        if self.mode == "fast" and not self._runner:
            lengths = self.lvlm.prompt_lengths(prompts)
        self._check_window(lengths)
        with tqdm(total=len(open_now), desc=progress, unit="prompt", disable=progress is None) as bar:
            for window in self._windows(requests, pieces, lengths, open_now):
                waiting = deque(window)
                tries = len(waiting)
                while waiting:
                    unit = waiting.popleft()
                    if not self._settle(unit, requests, found, generation, lengths):
                        waiting.append(unit)  # another process is at it
                        tries -= 1
                        if tries < 0:
                            time.sleep(_WAIT_SECONDS)
                        continue
                    bar.update(len(unit.members))
        self.stats.cache_hits += len(open_now) - self._computed  # another process has computed these
        self._account("generate" if generation else "score", self._computed, before, time.perf_counter() - started)
        return found

    def _check_window(self, lengths: list[int]) -> None:
        """Refuse what the model was not made for: beyond its positions answers are noise, and nothing says so."""
        room = getattr(self.lvlm.model.config.get_text_config(), "max_position_embeddings", None)
        if room and max(lengths, default=0) > room:
            raise UsageError(
                f"{self.name}: a prompt of {max(lengths)} tokens is longer than the {room} that the model reads; ask "
                "with fewer demonstrations or smaller images (processor: max_pixels in its YAML)"
            )

    def _settle(self, unit: _Unit, requests: list[Request], found: dict, generation: Any, lengths: list[int]) -> bool:
        """Find or compute what a unit still lacks; False where another process is computing it."""
        if self.cache is None:
            todo = {i: requests[i].missing(found) for i in unit.members}
            found.update({key: value for _, key, value in self._compute(unit, todo, generation, lengths)})
            return True
        todo = self._look_up(unit, requests, found)
        if not todo:
            return True
        claim = hashlib.sha256(b"".join(key for i in unit.members for key in requests[i].keys())).digest()[:20]
        if not self.cache.claim(claim):
            return False
        try:
            todo = self._look_up(unit, requests, found)  # it may have been written just before it was claimed
            fresh = self._compute(unit, todo, generation, lengths)
            new = self.cache.put(self._model_row, fresh, claim)
        except BaseException:
            self.cache.release(claim)
            raise
        found.update({key: value for _, key, value in fresh})
        if not new:  # another stage has asked the same in another pass; its rounding, written first, holds for all
            found.update(self.cache.get([key for _, key, _ in fresh]))
        return True

    def _look_up(self, unit: _Unit, requests: list[Request], found: dict) -> dict[int, Request]:
        """What a unit still lacks when all that the cache holds of it is ``found``."""
        lacking = [key for i in unit.members for key in requests[i].keys() if key not in found]
        found.update(self.cache.get(lacking))
        return {i: left for i in unit.members if (left := requests[i].missing(found))}

    def _compute(self, unit: _Unit, todo: dict[int, Request], generation: Any, lengths: list[int]) -> list[tuple]:
        """(kind, key, value) of everything that is missing of a unit's requests."""
        fresh: list[tuple[str, bytes, list]] = []
        self._computed += len(todo)
        for texts in (True, False):  # those that generate apart from those that only score
            some = {i: request for i, request in todo.items() if (request.text is not None) == texts}
            if not some:
                continue
            members, asked = list(some), [list(request.scores) for request in some.values()]
            settings = generation if texts else None
            replies = self._shrinking(members, asked, functools.partial(self._replies, unit, some, settings))
            for request, reply in zip(some.values(), replies, strict=True):
                if request.text is not None:
                    fresh.append(("generate", request.text, [reply.text]))
                fresh += score_entries(self.name, request, reply.scores)
        if lengths:
            self._count_naive(todo, generation, lengths)
        return fresh

    def _replies(
        self,
        unit: _Unit,
        some: dict[int, Request],
        settings: GenerationSettings | None,
        members: list[int],
        asked: list,
    ) -> list[Reply]:
        if unit.plan is not None:
            texts, scores = self._runner.run(unit.plan, [unit.leaves[i] for i in members], asked, settings)
        else:
            prompts = [some[i].prompt for i in members]
            if self.mode == "fast" and self.lvlm.shared is not None:
                texts, scores = self.lvlm.shared.ask(prompts, asked, settings)
                return [Reply(text, row) for text, row in zip(texts, scores, strict=True)]
            texts = self.lvlm.generate_batch(prompts, settings) if settings else [None] * len(members)
            scores = self._plain_scores(prompts, asked)
        return [Reply(text, row) for text, row in zip(texts, scores, strict=True)]

    def _plain_scores(self, prompts: list[Prompt], asked: list[list[tuple[str, bool]]]) -> list[list[AnswerScore]]:
        """One forward row for each (prompt, answer), in batches of as many rows as there are prompts."""
        rows: list[list[Any]] = [[None] * len(pairs) for pairs in asked]
        for end in (False, True):
            flat = [(i, j) for i, pairs in enumerate(asked) for j, pair in enumerate(pairs) if pair[1] == end]
            for start in range(0, len(flat), len(prompts)):
                part = flat[start : start + len(prompts)]
                scores = self.lvlm.score_batch([prompts[i] for i, _ in part], [asked[i][j][0] for i, j in part], end)
                for (i, j), score in zip(part, scores, strict=True):
                    rows[i][j] = score
        return rows

    def _windows(
        self, requests: list[Request], pieces: list, lengths: list[int], open_now: set[int]
    ) -> Iterator[list[_Unit]]:
        """Units of forward passes that lack something, window by window."""
        if self.mode == "naive":
            size = self.lvlm.config.naive_batch
            batches = [list(range(start, min(start + size, len(requests)))) for start in range(0, len(requests), size)]
            yield [_Unit(batch) for batch in batches if not open_now.isdisjoint(batch)]
            return
        extra = [self._extra(request) for request in requests]
        if self._runner is None:
            order = sorted(range(len(requests)), key=lambda i: lengths[i] + extra[i])
            batches = fill(order, [lengths[i] + extra[i] for i in order], self.token_budget)
            yield [_Unit(batch) for batch in batches if not open_now.isdisjoint(batch)]
            return
        for window in windows(lengths, _WINDOW_BUDGETS * self.token_budget):
            if open_now.isdisjoint(window):
                continue
            plan = self._runner.plan([pieces[i] for i in window], [extra[i] for i in window], self.token_budget)
            units = []
            for chunk in plan.chunks:
                leaves = {window[leaf.index]: leaf for leaf in chunk}
                if not open_now.isdisjoint(leaves):
                    units.append(_Unit(list(leaves), plan, leaves))
            yield units
            self._runner.forget()

    def _extra(self, request: Request) -> int:
        """Tokens that scoring adds behind the prompt."""
        ends: dict[str, bool] = {}
        for answer, end in request.scores:
            ends[answer] = end or ends.get(answer, False)
        return sum(len(self.lvlm.answer_ids(answer)) - 1 + end for answer, end in ends.items())

    def _shrinking(self, rows: list, more: list, run: Any) -> list:
        """``run(rows, more)``; on out-of-memory in two halves, and with half the token budget from then on."""
        try:
            return run(rows, more)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise UsageError(
                    f"{self.name}: out of memory with a single prompt; use smaller images (processor: max_pixels in "
                    "its YAML) or a larger GPU"
                ) from None
        torch.cuda.empty_cache()  # not sooner: the exception held the tensors of the pass
        self.token_budget = max(1, self.token_budget // 2)
        self.stats.shrinks += 1
        log.warning(
            "%s: out of memory with %d prompts; the token budget is now %d", self.name, len(rows), self.token_budget
        )
        middle = len(rows) // 2
        first = self._shrinking(rows[:middle], more[:middle], run)
        return [*first, *self._shrinking(rows[middle:], more[middle:], run)]

    def _count_naive(self, todo: dict[int, Request], generation: GenerationSettings | None, lengths: list[int]) -> None:
        for i, request in todo.items():
            passes = len(request.scores) + (request.text is not None)
            self.stats.images_naive += passes * len(request.prompt.images)
            beams = generation.num_beams if generation and request.text is not None else 0
            answers = sum(len(self.lvlm.answer_ids(answer)) for answer, _ in request.scores)
            self.stats.tokens_naive += (len(request.scores) + beams) * lengths[i] + answers

    def _work(self) -> tuple[int, int, int, int]:
        work = (self._runner or self.lvlm).work
        return work.passes, work.images, work.tokens, work.padded_tokens

    def _account(self, kind: str, computed: int, before: tuple, seconds: float) -> None:
        passes, images, tokens, padded = (now - then for now, then in zip(self._work(), before, strict=True))
        stats = self.stats
        stats.computed += computed
        stats.passes += passes
        stats.images_encoded += images
        stats.tokens_computed += tokens
        stats.tokens_padded += padded
        stats.seconds += seconds
        if self.cache and computed:
            device = str(self.lvlm.model.device.type)
            self.cache.add_rate(self._model_row, kind, device, Rate(computed, tokens, images, seconds))


def _runner(lvlm: Any, image_bytes: Any, kv_bytes: int) -> Any:
    """The fast path of a Qwen-VL model: in 16 bit the one that rounds each prompt by itself.

    A model that accelerate spreads over GPUs keeps transformers' own stack, whose 16-bit passes round by their shape.
    """
    fixed = lvlm.model.dtype in (torch.bfloat16, torch.float16) and not lvlm.config.device_map
    return (engine_fixed.FixedRunner if fixed else engine_fast.FastRunner)(lvlm, image_bytes, kv_bytes)
