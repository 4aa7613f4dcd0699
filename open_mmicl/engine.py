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
from open_mmicl.answer_cache import model_key
from open_mmicl.asking import DECIMALS, WAIT_SECONDS, Asking, EngineStats, Reply, Request, score_entries
from open_mmicl.errors import NumericError, UnscorableAnswerError, UsageError
from open_mmicl.interface import load_interface
from open_mmicl.interface.base import AnswerScore, GenerationSettings
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.prompts import Prompt
from open_mmicl.lazy import lazy
from open_mmicl.memory import image_budget, keep_freed
from open_mmicl.prefix_tree import fill, windows

server_engine = lazy("open_mmicl.server.engine")
__all__ = ["AnswerScore", "Engine", "EngineStats", "GenerationSettings", "Reply"]

log = logging.getLogger("lever_plus.engine")
MODES = ("fast", "naive")
_WINDOW_BUDGETS = 32  # prompts planned together: as many as fill this many forward passes


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
        super().__init__(cache_path)
        config = lvlm.config
        self.lvlm, self.mode, self.name, self.fingerprint = lvlm, mode, lvlm.name, lvlm.fingerprint
        self.device, self.kind, self.images = str(lvlm.model.device), lvlm.model.device.type, lvlm.images
        self.token_budget = token_budget or config.token_budget
        lvlm.full_logits = mode == "naive"
        if self.device == "cpu":
            keep_freed()
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
        if self.cache:
            self._model_row = self.cache.register(self.key, self.name, description)

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

    def _begin(self) -> None:
        """Nothing: the model is loaded."""

    def _find(
        self,
        requests: list[Request],
        lacking: list[int],
        found: dict[bytes, list],
        generation: GenerationSettings | None,
        progress: str | None,
    ) -> None:
        """Pass by pass, each written before the next begins."""
        open_now, prompts = set(lacking), [request.prompt for request in requests]
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
                            time.sleep(WAIT_SECONDS)
                        continue
                    bar.update(len(unit.members))

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
        of_unit = {i: requests[i] for i in unit.members}
        if self.cache is None:
            todo = {i: request.missing(found) for i, request in of_unit.items()}
            self._keep(self._compute(unit, todo, generation, lengths), found)
            return True
        if not self._look_up(of_unit, found):
            return True
        claim = hashlib.sha256(b"".join(key for request in of_unit.values() for key in request.keys())).digest()[:20]
        if not self.cache.claim(claim):
            return False
        try:
            todo = self._look_up(of_unit, found)  # it may have been written just before it was claimed
            self._keep(self._compute(unit, todo, generation, lengths), found, claim)
        except BaseException:
            self.cache.release(claim)
            raise
        return True

    def _compute(self, unit: _Unit, todo: dict[int, Request], generation: Any, lengths: list[int]) -> list[tuple]:
        """(kind, key, value) of everything that is missing of a unit's requests."""
        fresh: list[tuple[str, bytes, list]] = []
        self.stats.computed += len(todo)
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


def _runner(lvlm: Any, image_bytes: Any, kv_bytes: int) -> Any:
    """The fast path of a Qwen-VL model: in 16 bit the one that rounds each prompt by itself.

    A model that accelerate spreads over GPUs keeps transformers' own stack, whose 16-bit passes round by their shape.
    """
    fixed = lvlm.model.dtype in (torch.bfloat16, torch.float16) and not lvlm.config.device_map
    return (engine_fixed.FixedRunner if fixed else engine_fast.FastRunner)(lvlm, image_bytes, kv_bytes)
